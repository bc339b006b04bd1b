"""What version 0.1.0 wrote still opens and answers the same, or says what to do; tests/fixtures/make.py tells how it
was made."""
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from fastmed.all import load_learner, load_model

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
    # whoever trains fails
    for o in ('arms', 'compare', 'runs'): monkeypatch.setattr(f'fastmed.study.{o}.make_learner', None)
    study.run()
    kept = pd.read_csv(old/'summary.csv', index_col=[0, 1])
    found = study.summary()
    pd.testing.assert_series_equal(found['mean'], kept['mean'])
    # 0.1.0 drew its intervals by a bootstrap, which is too narrow for so few subjects
    assert (found.high-found.low>kept.high-kept.low).all()

def _copied(folder, other='3D, fold 1, seed 0'):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent/other, folder)

@pytest.mark.parametrize('spoil,says', [
    (lambda f: (f/'results.csv').write_bytes((f/'results.csv').read_bytes()[:-90]), 'results.csv: expected'),
    (lambda f: (f/'results.csv').write_text((f/'results.csv').read_text()+(f/'results.csv').read_text().splitlines()[-1]
     +'\n'), 'results.csv: expected one row a case and structure'),
    (lambda f: (f/'results.csv').write_bytes(b'\xff\0'), 'results.csv: the table of a finished run cannot be read'),
    (lambda f: shutil.copy(f.parent/'3D, fold 1, seed 0'/'results.csv', f),
     'results.csv: is of another run: expected fold 0; found 1'),
    (_copied, "seed 0: holds the run of .*'fold': 1"),
    (lambda f: (f/'run.json').write_text('{'), 'run.json: what was noted of the runs cannot be read'),
    (lambda f: (f.parent/'comparison.json').write_text('[]'), 'comparison.json: expected what was noted'),
    (lambda f: (f.parent/'comparison.json').write_text('{}'), 'holds runs of another experiment')])
def test_a_run_that_is_not_whole_gives_no_table(tmp_path, monkeypatch, spoil, says):
    "Cases that are missing, or those of another run, do not vanish from a mean without a word"
    monkeypatch.syspath_prepend(fixtures)
    make = __import__('make')
    shutil.copytree(old/'comparison', tmp_path/'comparison')
    df = make.scans(tmp_path)
    spoil(tmp_path/'comparison'/'3D, fold 0, seed 0')
    with pytest.raises(ValueError, match=says): make.comparison(df, tmp_path, tmp_path/'comparison').summary()
