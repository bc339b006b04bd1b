"Train, compare and ship deep-learning models on medical scans, in fastai's own words."
import sys
__version__ = "0.2.0"

class _Renamed:
    "Says what became of a module of 0.1.0, such as one that an older pickle names"
    names = frozenset((
        'fastmed.adapt', 'fastmed.archive', 'fastmed.augment', 'fastmed.blocks', 'fastmed.callbacks',
        'fastmed.casefiles', 'fastmed.check', 'fastmed.classify', 'fastmed.compare', 'fastmed.crossval',
        'fastmed.curves', 'fastmed.datasets', 'fastmed.dicom', 'fastmed.dicomseg', 'fastmed.doctor',
        'fastmed.efficiency', 'fastmed.encoders', 'fastmed.ensemble', 'fastmed.findings', 'fastmed.gradcam',
        'fastmed.guard', 'fastmed.heads', 'fastmed.inference', 'fastmed.inflate', 'fastmed.interpret',
        'fastmed.labels', 'fastmed.leaks', 'fastmed.learner', 'fastmed.losses', 'fastmed.memory',
        'fastmed.patches', 'fastmed.plain', 'fastmed.preprocess', 'fastmed.pretrain', 'fastmed.radiographs',
        'fastmed.report', 'fastmed.resenc', 'fastmed.scores', 'fastmed.ship', 'fastmed.stats', 'fastmed.store',
        'fastmed.survey', 'fastmed.track', 'fastmed.tta', 'fastmed.uncertainty', 'fastmed.weights', 'fastmed.zoo'))
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in cls.names: return None
        raise RuntimeError(f"{name} is a module of fastmed 0.1.0, and has another place in {__version__}: "
                           "CHANGELOG.md lists them. "
                           "A pickle that names it was exported by 0.1.0 and opens only there: call "
                           "save_model(load_learner(...), 'model.safetensors') there; load_model opens that file here")

sys.meta_path.insert(0, _Renamed)
