"""opdctl: declarative multi-stage post-training recipes with on-policy distillation."""

__version__ = "0.2.0"
