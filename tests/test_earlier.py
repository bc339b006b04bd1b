"What version 0.1.0 wrote still opens and answers the same, or says what to do; tests/fixtures/make.py tells how it was made."
import shutil
import sys
from pathlib import Path
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from fastmed.all import Comparison, load_learner, load_model

fixtures = Path(__file__).resolve().parent/'fixtures'
old = fixtures/'v0_1_0'

@pytest.mark.parametrize('ndim', [2, 3])
def test_segmentation_model(ndim):
    "The same mask, in the scan's own place"
    found = load_model(old/f'unet{ndim}d.safetensors').predict_volume(old/'scan.nii.gz')
    kept = nib.load(old/f'unet{ndim}d.nii.gz')
    assert np.array_equal(found.numpy(), np.asarray(kept.dataobj)) and np.allclose(found.affine, kept.affine)

def test_classifier():
    "The same answers to six digits"
    found = load_model(old/'classifier.safetensors').predict_folder(old, 'scan.nii.gz')
    kept = pd.read_csv(old/'classifier.csv')
    probs = [o for o in kept if o.startswith('prob_')]
    assert list(found.pred)==list(kept.pred) and len(probs)==2
    assert np.allclose(found[probs], kept[probs], atol=1e-6)

def test_exported_learner_says_what_to_do():
    "A pickle names modules that have another place now"
    with pytest.raises(RuntimeError, match=r'was exported by 0\.1\.0 .* save_model\(load_learner'):
        load_learner(old/'learner2d.pkl')

def test_finished_comparison(tmp_path, monkeypatch):
    "Its runs are not trained again, and give the same table"
    monkeypatch.syspath_prepend(fixtures)
    make = __import__('make')
    shutil.copytree(old/'comparison', tmp_path/'comparison')
    df = make.scans(tmp_path)
    study = make.comparison(df, tmp_path, tmp_path/'comparison')
    monkeypatch.setattr(sys.modules[Comparison.__module__], 'make_learner', None)      # whoever trains fails
    study.run()
    kept = pd.read_csv(old/'summary.csv', index_col=[0, 1])
    pd.testing.assert_frame_equal(study.summary()[['mean', 'low', 'high']], kept[['mean', 'low', 'high']])
