"""Experiments on top of training, evaluation and sampling: ablations, sweeps, attention pictures and reports."""
