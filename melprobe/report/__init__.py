"""Figures and the report, rebuilt from a run's saved rows alone; nothing here imports torch."""
