"""What strategies share: prompts from maps, the decoder, redrawing, adaptation."""
