"""Accuracy from counts of right answers: estimators and their intervals."""
