"""World action models: one network that predicts future video and robot actions together, and every way of using it."""

__version__ = "0.1.0"
