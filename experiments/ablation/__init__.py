"""Parts of the optimizer ablation: arms, claims and report."""
