"""Modules of this package, as in torch.nn: layers that keep less for backward, and the adapters' layers."""
