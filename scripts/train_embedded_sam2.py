"""Train the embedded SAM 2 on synthetic subjects: first its features, then its memory and decoder.

``python scripts/train_embedded_sam2.py --work DIR`` runs both stages on a CUDA device where there is one, else on the
CPU, and writes DIR/embedded_sam2.safetensors in half precision. Started again after a kill it goes on where it was.
The teacher, Meta's Hiera-tiny image encoder, is read from $NNUNET_SAM2_WEIGHTS (default ../shared/weights). No real
image is used anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from bench_data import HIERA_TINY_IMAGE
from embedded_sam2.export import write_weights
from embedded_sam2.features_stage import FeatureSettings, train_features
from embedded_sam2.memory_stage import MemorySettings, train_memory
from embedded_sam2.run_state import load_model
from embedded_sam2.shards import Shards, ShardSettings

from nnunet_sam2.sam2.backend import choose_device
from nnunet_sam2.sam2.config import load_config
from nnunet_sam2.sam2.model import build_model


def main() -> None:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, checkpoints, logs and weights")
    parser.add_argument("--shards", type=Path, default=None, help="folder for the teacher's features (default: work)")
    parser.add_argument("--stage", choices=["features", "memory", "all"], default="all")
    parser.add_argument("--teacher", type=Path, default=HIERA_TINY_IMAGE)
    parser.add_argument("--teacher-size", type=int, default=512)
    parser.add_argument("--config", default="embedded")
    parser.add_argument("--size", type=int, default=None, help="pixels; default: the architecture's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    features = parser.add_argument_group("features")
    features.add_argument("--n-shards", type=int, default=FeatureSettings.shards)
    features.add_argument("--families", type=int, default=ShardSettings.families, help="anatomies a shard")
    features.add_argument("--feature-steps", type=int, default=FeatureSettings.steps)
    features.add_argument("--feature-batch", type=int, default=FeatureSettings.batch)
    features.add_argument("--feature-rate", type=float, default=FeatureSettings.peak_rate)
    features.add_argument("--start", choices=["copy", "random"], default=FeatureSettings.start)
    features.add_argument("--last-block", type=int, default=FeatureSettings.last_block)
    features.add_argument("--train-all", action="store_true", help="train the copied first stages too")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--pools", type=Path, default=None, help="folder for clip features (default: work)")
    memory.add_argument("--n-families", type=int, default=MemorySettings.families)
    memory.add_argument("--memory-steps", type=int, default=MemorySettings.steps)
    memory.add_argument("--memory-rate", type=float, default=MemorySettings.peak_rate)
    memory.add_argument("--batch-frames", type=int, default=MemorySettings.batch_frames)
    memory.add_argument("--no-lookup", action="store_true", help="start memory attention from sam2's initial values")
    memory.add_argument("--encoder", type=Path, default=None, help="features.pt of another folder")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    config = load_config(args.config)
    size = args.size or config.image_size
    # Everything random later is drawn from the seed and the step's number.
    torch.manual_seed(args.seed)
    model: Any = build_model(config, size)
    if args.stage in ("features", "all"):
        shards = Shards(
            args.shards or args.work,
            ShardSettings(
                teacher=args.teacher, teacher_size=args.teacher_size, size=size, seed=args.seed, families=args.families
            ),
            device,
        )
        settings = FeatureSettings(
            seed=args.seed,
            shards=args.n_shards,
            steps=args.feature_steps,
            batch=args.feature_batch,
            peak_rate=args.feature_rate,
            start=args.start,
            last_block=args.last_block,
            freeze=not args.train_all,
        )
        train_features(model, shards, settings, args.work, device)
    if args.stage in ("memory", "all"):
        load_model(model, args.encoder or args.work / "features.pt")
        memory_settings = MemorySettings(
            seed=args.seed,
            families=args.n_families,
            steps=args.memory_steps,
            batch_frames=args.batch_frames,
            peak_rate=args.memory_rate,
            lookup=not args.no_lookup,
        )
        train_memory(model, memory_settings, args.work, device, pools=args.pools or args.work)
    print(write_weights(model, config, args.work / "embedded_sam2.safetensors"))


if __name__ == "__main__":
    main()
