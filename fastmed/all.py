"Everything of fastmed, and of `fastai.vision.all`, for scripts and notebooks: `from fastmed.all import *`."
from fastai.vision.all import *
from fastmed.core import *
from fastmed.io import *
from fastmed.datasets import *
from fastmed.doctor import *
from fastmed.preprocess import *
from fastmed.store import *
from fastmed.patches import *
from fastmed.augment import *
from fastmed.data import *
from fastmed.models import *
from fastmed.losses import *
from fastmed.metrics import *
from fastmed.inference import *
from fastmed.callbacks import *
from fastmed.learner import *
from fastmed.report import *
