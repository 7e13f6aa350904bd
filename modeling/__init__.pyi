from modeling.api import TrainedModel, load_model

__all__ = ["TrainedModel", "load_model"]
