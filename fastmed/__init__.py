"Train, compare and ship deep-learning models on medical scans, in fastai's own words."
__version__ = "0.1.0"
