"""SAM 2 behind one protocol: checkpoints, embeddings kept between uses, prompts in, mask logits out."""
