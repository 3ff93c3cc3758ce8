"""What the experiments on training regimes share: runs, claims, geometry, reports."""
