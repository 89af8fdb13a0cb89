from smooth_foley.pipeline import SmoothFoleyPipeline

__all__ = ['SmoothFoleyPipeline']
