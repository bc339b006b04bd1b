"""What a notebook needs, by task: `from fastmed.all import *`, which brings `fastai.vision.all` too. What is not named
here is imported from its module, such as `from fastmed.metrics.masks import slice_consistency`."""
from fastai.vision.all import *

# ---- scans: read, look, write
from fastmed.core import FastmedError, InputError, TensorSlice, TensorSliceMask, TensorVolume, TensorVolumeMask
from fastmed.io.dicom import load_dicom_seg, save_dicom_seg, scan_dicom
from fastmed.io.volumes import load_mask, load_volume, read_header, resample_to, save_volume, to_orientation
from fastmed.io.radiographs import load_radiograph, TensorRadiograph
from fastmed.plot import plot_volume

# ---- a data set: cases, subjects, splits, checks
from fastmed.data.downloads import untar_data, URLs
from fastmed.data.datasets import cohort, phantom
from fastmed.data.labels import group_folds, GroupSplitter
from fastmed.data.cases import scan_decathlon, scan_folder
from fastmed.data.check import check_dataset
from fastmed.data.oddities import distribution_shift
from fastmed.data.leaks import find_leaks

# ---- a pipeline: from files to batches
from fastmed.data.preprocess import Plan, Preprocess
from fastmed.data.plan import suggest_plan
from fastmed.data.recipe import Recipe, whole_plan
from fastmed.data.store import cache_dir, Store
from fastmed.data.blocks import CaseFiles, SliceBlock, SliceMaskBlock, VolumeBlock, VolumeMaskBlock
from fastmed.data.transforms import PatchTransform, WholeTransform
from fastmed.data.labels import LabelOf
from fastmed.data.loaders import SliceDataLoaders, VolumeDataLoaders
from fastmed.data.radiographs import radiograph_tfms, RadiographBlock, RadiographDataLoaders
from fastmed.data.augment import IntensityTfm, SpatialTfm, volume_tfms
from fastmed.data.torchio import TorchIOTransform

# ---- networks and weights
from fastmed.models.unet import UNet
from fastmed.models.zoo import create_model, model_names
from fastmed.models.adapt import adapt_input
from fastmed.models.inflate import inflate
from fastmed.models.weights import load_encoder, load_weights, save_encoder
from fastmed.models.encoders import encoder_names
from fastmed.models.classifiers import create_classifier

# ---- Learners
from fastmed.learn.learner import unet2d_learner, unet3d_learner, VolumeLearner
from fastmed.learn.classify import CaseLearner, classifier_learner, regression_learner
from fastmed.learn.pretrain import restoration_learner
from fastmed.learn.ensemble import Ensemble
from fastmed.learn.uncertainty import case_uncertainty
from fastmed.predict.tta import TTA

# ---- losses and callbacks
from fastmed.learn.losses import DiceCELoss, DiceLoss, FocalLoss, LabelLoss, MultiTaskLoss, TverskyLoss
from fastmed.learn.callbacks import DeepSupervisionLoss, DiceCallback, PictureCallback, TensorBoardVolumes
from fastmed.learn.pace import BudgetCallback, CostCallback
from fastmed.learn.resume import ResumeCallback

# ---- scores
from fastmed.metrics.masks import (
    case_scores, dice_metrics, dice_score, DiceScore, hausdorff95, summarise, surface_dice, volume_mm3
)
from fastmed.metrics.scores import average_precision, label_metrics, roc_auc
from fastmed.metrics.paired import paired_comparison
from fastmed.metrics.stats import mean_interval

# ---- model files
from fastmed.learn.ensemble import load_model
from fastmed.learn.modelfile import save_model
from fastmed.learn.onnx import export_onnx, load_onnx

# ---- studies: compare, cross-validate, explain
from fastmed.study.compare import Comparison, ComparisonCallback
from fastmed.study.efficiency import anisotropy_shift, compare_learners, label_efficiency
from fastmed.study.crossval import cross_validate, CrossValidation
from fastmed.study.gradcam import grad_cam, plot_cam
from fastmed.study.interpret import CaseInterpretation


def __getattr__(name):
    "A name that stood here in 0.1.0, out of its module, with a warning that says which"
    import importlib
    import warnings

    from fastmed._modidx import d
    for module,names in d['syms'].items():
        if f'{module}.{name}' in names and not name.startswith('_'):
            warnings.warn(f'fastmed.all.{name} stands in its module now: from {module} import {name}', stacklevel=2)
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f'module fastmed.all has no attribute {name!r}')
