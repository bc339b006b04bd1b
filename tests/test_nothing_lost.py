"What a person has made by hand, or cannot get back, is never replaced without being asked."
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fastmed.all import TensorVolumeMask, save_volume
from fastmed.core import ArgumentError, FileError


def snapshot(path):
    return {str(f.relative_to(path)):f.read_bytes() for f in sorted(Path(path).rglob('*')) if f.is_file()}

def write_gz(src, dst, n=2):
    "Scans c0, c1 of the study as .nii.gz in `dst`"
    Path(dst).mkdir(parents=True, exist_ok=True)
    for i in range(n): nib.save(nib.load(Path(src)/f'images/c{i}.nii'), Path(dst)/f'c{i}.nii.gz')

def predict(learn, *args, **kwargs):
    with learn.no_bar(): return learn.predict_folder(*args, **kwargs)

def correct(fn, value=1):
    "Change one voxel and keep the header, as programs do in which masks are corrected"
    im = nib.load(fn)
    a = np.asarray(im.dataobj).copy()
    a[3,3,3] = value if a[3,3,3]!=value else 0
    nib.save(nib.Nifti1Image(a, im.affine, im.header), fn)
    return a

class TestFolder:
    @pytest.fixture
    def scans(self, study, tmp_path):
        write_gz(study[0], tmp_path/'images')
        return tmp_path/'images'

    def test_a_source_is_never_replaced(self, learner, scans, tmp_path):
        learn = learner(3)
        was = snapshot(scans)
        (tmp_path/'link').symlink_to(scans, target_is_directory=True)
        for dst in (scans, scans/'..'/'images', tmp_path/'link'):
            for kw in (dict(), dict(overwrite=True)):
                with pytest.raises(FileError, match=r'c0.nii.gz: is read for the prediction'):
                    predict(learn, scans, dst, **kw)
        assert snapshot(scans)==was

    def test_ground_truth_in_the_folder_is_kept(self, learner, scans, study, tmp_path):
        learn = learner(3)
        dst = tmp_path/'labels'
        dst.mkdir()
        nib.save(nib.load(study[0]/'labels/c1.nii'), dst/'c1.nii.gz')
        was = snapshot(dst)
        with pytest.raises(FileError, match=r'c1.nii.gz: is there already.*overwrite=True'): predict(learn, scans, dst)
        # refused before anything is predicted
        assert snapshot(dst)==was
        assert (predict(learn, scans, dst, overwrite=True).status=='ok').all() and snapshot(dst).keys()=={'c0.nii.gz',
                'c1.nii.gz'}!=was.keys()

    def test_a_mask_corrected_by_hand_is_kept(self, learner, scans, tmp_path):
        learn = learner(3)
        dst = tmp_path/'masks'
        predict(learn, scans, dst)
        first = snapshot(dst)
        # called again: nothing to do
        predict(learn, scans, dst)
        assert snapshot(dst)==first
        a = correct(dst/'c0.nii.gz')
        (dst/'c1.nii.gz').unlink()
        with pytest.raises(FileError, match='c0.nii.gz: is there already.*changed since'): predict(learn, scans, dst)
        assert np.array_equal(np.asarray(nib.load(dst/'c0.nii.gz').dataobj), a) and not (dst/'c1.nii.gz').exists()
        predict(learn, scans, dst, overwrite=True)
        assert snapshot(dst)==first

    def test_a_moved_affine_counts_as_a_correction(self, learner, scans, tmp_path):
        learn = learner(3)
        dst = tmp_path/'masks'
        predict(learn, scans, dst)
        im = nib.load(dst/'c0.nii.gz')
        aff = im.affine.copy()
        aff[0,3] += 5
        nib.save(nib.Nifti1Image(np.asarray(im.dataobj), aff, im.header), dst/'c0.nii.gz')
        with pytest.raises(FileError, match='c0.nii.gz'): predict(learn, scans, dst)

    def test_a_prediction_is_replaced_by_that_of_another_model(self, learner, scans, tmp_path):
        dst = tmp_path/'masks'
        learn = learner(3)
        predict(learn, scans, dst)
        first = snapshot(dst)
        zero = lambda m: torch.zeros_like(m)
        predict(learn, scans, dst, post=zero)
        second = snapshot(dst)
        assert all(first[k]!=second[k] for k in first)
        predict(learn, scans, dst, post=zero)
        predict(learn, scans, dst)
        assert snapshot(dst)==first

    def test_a_correction_made_meanwhile_is_kept(self, learner, scans, tmp_path, monkeypatch):
        "The second mask is corrected while the first scan is being predicted"
        dst = tmp_path/'masks'
        learn = learner(3)
        predict(learn, scans, dst)
        kept = []
        ask = type(learn).predict_volume
        def slow(self, fn, **kwargs):
            if not kept: kept.append(correct(dst/'c1.nii.gz'))
            return ask(self, fn, **kwargs)
        monkeypatch.setattr(type(learn), 'predict_volume', slow)
        res = predict(learn, scans, dst, post='keep_largest').set_index('case')
        assert res.status['c0']=='ok' and 'changed since' in res.status['c1'] and np.array_equal(
                np.asarray(nib.load(dst/'c1.nii.gz').dataobj), kept[0])

    def test_again_is_refused_by_name(self, learner, scans, tmp_path):
        with pytest.raises(ArgumentError, match='overwrite=True'): predict(learner(3), scans, tmp_path/'m', again=True)

    def test_a_file_in_place_of_the_folder_is_found_first(self, learner, scans, tmp_path):
        learn = learner(3)
        (tmp_path/'m').write_text('notes')
        learn.predict_volume = None
        with pytest.raises(FileError, match='a file is where a folder should be'): predict(learn, scans, tmp_path/'m')
        assert (tmp_path/'m').read_text()=='notes'

def test_a_note_that_was_copied_does_not_count(tmp_path):
    "Another mask under the header of a prediction: the digest is that of the voxels"
    from fastmed.predict.predict import check_free, prediction_key, save_prediction
    m = TensorVolumeMask(torch.arange(60).reshape(3,4,5)%3, affine=np.diag([1.,1,2.5,1]))
    fn = save_prediction(m, tmp_path/'m.nii.gz', 'key')
    assert prediction_key(fn)=='key'
    for k,f in enumerate((lambda m: m.flip(0), lambda m: m.transpose(0,1), lambda m: m+1)):
        other = f(m)
        other.affine = m.affine
        save_volume(other, tmp_path/f'o{k}.nii.gz', note=bytes(nib.load(fn).header['descrip'].item()).decode())
        assert prediction_key(tmp_path/f'o{k}.nii.gz') is None
    for name,b in (('none.nii.gz',b''),('half.nii.gz',fn.read_bytes()[:-20]),('text.nii.gz',b'text'*200)):
        (tmp_path/name).write_bytes(b)
        assert prediction_key(tmp_path/name) is None
        with pytest.raises(FileError, match=name): check_free([tmp_path/name])
    shutil.copy(fn, tmp_path/'copy.nii.gz')
    check_free([tmp_path/'copy.nii.gz'])
