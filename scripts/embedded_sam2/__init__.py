"""What the embedded SAM 2 is trained on and how: synthetic subjects, clips, distillation, losses."""
