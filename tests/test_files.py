"""What files, tables and codes say, and what is refused by name: units, both forms of a header, codes, marks, relative
names, layouts."""
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.all import DataBlock, RandomSplitter
from phantoms import CODES, affine_of, write_case

from fastmed.all import (
    CaseFiles,
    Comparison,
    InputError,
    PatchTransform,
    Preprocess,
    RadiographDataLoaders,
    SliceDataLoaders,
    TensorVolumeMask,
    VolumeBlock,
    VolumeDataLoaders,
    VolumeMaskBlock,
    check_dataset,
    find_leaks,
    label_efficiency,
    load_mask,
    load_volume,
    read_header,
    resample_to,
    save_volume,
    scan_decathlon,
    scan_folder,
    to_orientation,
    unet2d_learner,
    unet3d_learner,
)
from fastmed.core import ArgumentError, FastmedError, FileError
from fastmed.data.datasets import phantom
from fastmed.io.volumes import check_same_grid, resampled_grid
from fastmed.study.crossval import CrossValidation

NESTED = {'background':0, 'WT':[1,2,3], 'TC':[1,3], 'ET':3}
QUIET = dict(spacing=None, patch=16, bs=2, samples_per_case=1, num_workers=0, device='cpu')

def put_header(fn, unit=None, sform=None, qform=None, scale=1.):
    "Rewrite a NIfTI file: unit, (4,4) and code of both forms; `scale`: units in one mm"
    im = nib.load(fn)
    a = np.asarray(im.dataobj).copy()
    new = nib.Nifti1Image(a, np.diag([scale]*3+[1])@im.affine)
    if unit: new.header.set_xyzt_units(unit)
    if sform: new.set_sform(*sform)
    if qform: new.set_qform(*qform)
    nib.save(new, fn)
    return fn

def decoys(folder, df):
    "Files of the same relative names with nothing in them"
    for f in [*df.image, *df['mask']]:
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.zeros((20,20,20), np.uint8), np.eye(4)), folder/f)

# --- codes

def codes_doors(study, cache):
    path,df = study
    kw = dict(path=path, cache=cache, **QUIET)
    return dict(from_df=lambda c: VolumeDataLoaders.from_df(df, codes=c, **kw),
                slices=lambda c: SliceDataLoaders.from_df(df, codes=c, **kw),
                preprocess=lambda c: Preprocess(codes=c), block=lambda c: VolumeMaskBlock(c),
                check=lambda c: check_dataset(df, c, path),
                attrs=lambda c: VolumeDataLoaders.from_df(with_codes(df, c), **kw),
            comparison=lambda c: Comparison(df, codes=c, path=cache/'c'))

def with_codes(df, c):
    df = df.copy()
    df.attrs['codes'] = c
    return df

DOORS = ('from_df','slices','preprocess','block','check','attrs','comparison')

@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('codes,says',
        [(NESTED, ("value 1","'WT'","'TC'")),
        ({'large':1, 'background':0, 'small':2}, ("'background'","'large'",'first')),
                                        (['large','background','small'], ("'background'",'first')),
        (['background','a','a'], ("['a']",'more than once')),
                                        ({'background':0, 'a':1, 1:2, '1':[3]}, ("['1']",'more than once'))])
def test_codes_that_would_be_scored_wrongly_are_refused_by_name(study, cache, door, codes, says):
    with pytest.raises(InputError) as e: codes_doors(study, cache)[door](codes)
    for s in says: assert s in str(e.value)

def test_codes_take_numpys_integers(study, cache):
    path,df = study
    codes = {'background':np.int64(0), 'ball':np.array([1,2], np.uint8)}
    pre = Preprocess(codes=codes, spacing=np.int64(2))
    assert Preprocess.from_json(pre.to_json())==pre and json.loads(pre.to_json())['codes']=={'background':0,
            'ball':[1,2]}
    dls = VolumeDataLoaders.from_df(df, path=path, codes=codes, cache=cache, **QUIET)
    assert dls.codes==['background','ball'] and int(dls.one_batch()[1].max())==1
    assert Preprocess(codes={'background':[0,3], 'ball':range(1,3)}).codes=={'background':[0,3], 'ball':[1,2]}

@pytest.mark.parametrize('codes', ['background,lesion', {'background':0, 'a':'one'}, {'background':0, 'a':1.5},
        {'background':0, 'a':[]}, []])
def test_codes_of_the_wrong_kind_are_refused(codes):
    with pytest.raises(FastmedError, match='codes'): Preprocess(codes=codes)

# --- units

@pytest.mark.parametrize('unit,scale', [('meter',.001), ('micron',1000.)])
def test_units_are_converted_to_mm_and_given_back(tmp_path, unit, scale):
    row = write_case(tmp_path, 'a', affine_of('LAS', (1,1.5,2), (3,-4,5)))
    want = load_volume(tmp_path/row['image'])
    fn = put_header(tmp_path/row['image'], unit, scale=scale)
    t = load_volume(fn)
    h = read_header(fn)
    assert np.allclose(t.affine, want.affine, rtol=1e-5) and np.allclose(h['spacing'], (1,1.5,2),
            rtol=1e-5) and h['unit']==unit
    check_same_grid(t, load_mask(tmp_path/row['mask']))
    for o in (t, to_orientation(to_orientation(t, 'PIR'), 'LAS'), to_orientation(t, 'RAS')):
        m = TensorVolumeMask(torch.ones(o.shape[1:], dtype=torch.uint8), affine=o.affine, meta=o.meta)
        out = nib.load(m.save(tmp_path/'m.nii.gz'))
        assert out.header.get_xyzt_units()[0]==unit and np.allclose(load_mask(tmp_path/'m.nii.gz').affine, o.affine,
                rtol=1e-5)
        assert np.allclose(out.header.get_zooms(), np.array(o.spacing)*scale, rtol=1e-5)

def test_a_unit_that_is_not_stated_is_mm(tmp_path):
    row = write_case(tmp_path, 'a')
    im = nib.load(tmp_path/row['image'])
    im.header['xyzt_units'] = 0
    nib.save(im, tmp_path/'u.nii')
    assert load_volume(tmp_path/'u.nii').spacing==(1,1,1) and read_header(tmp_path/'u.nii')['unit']=='mm'

def test_the_doctor_says_the_unit(study, tmp_path):
    path,df = study
    row = write_case(tmp_path, 'm', affine_of('RAS'), seed=9)
    put_header(tmp_path/row['image'], 'meter', scale=.001)
    r = check_dataset(pd.DataFrame([row]), CODES, tmp_path)
    got = pd.DataFrame(r)[r.problem=='unit of length']
    assert len(got)==1 and got.case.iloc[0]=='m' and 'meter' in got.found.iloc[0] and not len(r.errors)

# --- both forms of a header

def two_places(fn, codes=(4,1)):
    im = nib.load(fn)
    q = im.affine.copy()
    q[:3,3] += (30,-20,10)
    return put_header(fn, 'mm', (im.affine, codes[0]), (q, codes[1]))

def same_forms(a, b):
    a,b = [nib.load(o).header for o in (a,b)]
    assert int(a['sform_code'])==int(b['sform_code']) and int(a['qform_code'])==int(b['qform_code'])
    for k in ('get_sform','get_qform'):
        (x,_),(y,_) = getattr(a, k)(coded=True),getattr(b, k)(coded=True)
        assert (x is None)==(y is None) and (x is None or np.allclose(x, y, atol=1e-4))

@pytest.mark.parametrize('codes', [(4,1), (1,2), (0,1), (2,0), (0,0), (5,1)])
@pytest.mark.parametrize('code', ['RAS','LPI','PSR'])
def test_a_mask_has_both_forms_of_its_scan(tmp_path, codes, code):
    row = write_case(tmp_path, 'a', affine_of(code, (1,1.2,2), (3,-4,5)), (10,12,14))
    fn = two_places(tmp_path/row['image'], (0 if codes[0]==0 else 1, codes[1]))
    im = nib.load(fn)
    im.header['sform_code'] = codes[0]
    nib.save(nib.Nifti1Image(np.asarray(im.dataobj), im.header.get_best_affine(), im.header), tmp_path/'b.nii')
    t = load_volume(tmp_path/'b.nii')
    pre = Preprocess(spacing=1.5)
    x = pre(t)
    lab = TensorVolumeMask(torch.ones(x.shape[1:], dtype=torch.uint8), affine=x.affine, meta=x.meta)
    m = pre.inverse(lab, t.shape[1:], t.affine)
    m.meta = t.meta
    same_forms(m.save(tmp_path/'m.nii.gz'), tmp_path/'b.nii')
    same_forms(save_volume(t, tmp_path/'t.nii'), tmp_path/'b.nii')

def test_predictions_carry_both_forms(learner, tmp_path):
    row = write_case(tmp_path, 'a', affine_of('PIL', (.8,1.4,2.), (5,6,7)), (24,18,15))
    fn = two_places(tmp_path/row['image'])
    learn = learner(3)
    m,p = learn.predict_volume(fn, proba=True)
    same_forms(m.save(tmp_path/'m.nii.gz'), fn)
    same_forms(p.save(tmp_path/'p.nii.gz'), fn)
    (tmp_path/'in').mkdir()
    fn.rename(tmp_path/'in'/'a.nii')
    learn.predict_folder(tmp_path/'in', tmp_path/'out', '*.nii')
    same_forms(tmp_path/'out'/'a.nii.gz', tmp_path/'in'/'a.nii')
    m.save(tmp_path/'m.nrrd')
    assert np.allclose(load_mask(tmp_path/'m.nrrd').affine, m.affine, atol=1e-4)

def test_an_orientation_turns_both_forms(tmp_path):
    row = write_case(tmp_path, 'a', affine_of('LPS', (1,1.2,2), (3,-4,5)), (10,12,14))
    fn = two_places(tmp_path/row['image'])
    t = to_orientation(load_volume(fn), 'RAS')
    out = nib.load(save_volume(t, tmp_path/'t.nii'))
    src = nib.load(fn).header
    want = nib.orientations.inv_ornt_aff(nib.orientations.ornt_transform(nib.io_orientation(src.get_sform()),
            [[0,1],[1,1],[2,1]]), (10,12,14))
    assert np.allclose(out.header.get_sform(), src.get_sform()@want, atol=1e-4) and np.allclose(out.header.get_qform(),
            src.get_qform()@want, atol=1e-4)

def test_a_changed_affine_carries_no_stale_forms(tmp_path):
    row = write_case(tmp_path, 'a')
    fn = two_places(tmp_path/row['image'])
    t = load_volume(fn)
    t.affine = t.affine+np.array([[0,0,0,7.],[0]*4,[0]*4,[0]*4])
    for o in (t, resample_to(load_volume(fn), *resampled_grid((20,20,20), np.eye(4), (2,2,2)))):
        h = nib.load(save_volume(o, tmp_path/'t.nii')).header
        assert np.allclose(h.get_best_affine(), o.affine) and h.get_qform(coded=True)[0] is None

# --- relative names

@pytest.fixture
def relative(tmp_path, monkeypatch):
    "Cases under relative names in the folder of this process, and another folder with files of the same names"
    here,there = tmp_path/'here',tmp_path/'there'
    rows = [dict(write_case(here/'data', f'c{i}', seed=i), subject=f's{i}') for i in range(4)]
    df = pd.DataFrame(rows)
    there.mkdir()
    decoys(there/'data', df)
    decoys(there, df)
    monkeypatch.chdir(here)
    return df,there,tmp_path

def batches(dls): return [b[0].as_subclass(torch.Tensor).clone() for b in dls.valid]

@pytest.mark.parametrize('cls', [VolumeDataLoaders, SliceDataLoaders])
def test_relative_names_stay_where_they_were_given(relative, monkeypatch, cls):
    df,there,tmp = relative
    dls = cls.from_df(df, path='data', codes=CODES, cache=tmp/'cache', valid_pct=.5, **QUIET)
    was = batches(dls)
    dls = cls.from_df(df, path='data', codes=CODES, cache=tmp/'cache', valid_pct=.5, **QUIET)
    monkeypatch.chdir(there)
    for a,b in zip(was, batches(dls)): assert torch.equal(a, b)
    learn = (unet3d_learner if cls is VolumeDataLoaders else unet2d_learner)(dls, nf=4, depth=2, path=tmp)
    assert (learn.evaluate().target_mm3>0).all()

def test_relative_names_of_a_plain_block(relative, monkeypatch):
    df,there,tmp = relative
    pre = Preprocess(codes=CODES)
    db = DataBlock(blocks=(VolumeBlock(pre), VolumeMaskBlock(CODES, pre)), get_x=CaseFiles('image', 'data'),
            get_y=CaseFiles('mask', 'data'),
                   splitter=RandomSplitter(.5, seed=0), item_tfms=PatchTransform((16,16,16)))
    dls = VolumeDataLoaders.from_dblock(db, df, bs=2, num_workers=0, device='cpu')
    monkeypatch.chdir(there)
    assert float(dls.valid.one_batch()[0].std())>0

def test_relative_names_of_pictures(tmp_path, monkeypatch):
    from PIL import Image
    here,there = tmp_path/'here',tmp_path/'there'
    for f in (here,there):
        f.mkdir()
        for i in range(8):
            Image.fromarray((np.random.default_rng(i).random((16,16))*255*(f is here)
                    +np.eye(16)).astype(np.uint8)).save(f/f'{i}.png')
    df = pd.DataFrame(dict(image=[f'{i}.png' for i in range(8)], label=list('abababab')))
    monkeypatch.chdir(here)
    dls = RadiographDataLoaders.from_df(df, size=16, cache=tmp_path/'c', num_workers=0, device='cpu', batch_tfms=None)
    was = dls.valid.one_batch()[0]
    dls = RadiographDataLoaders.from_df(df, size=16, cache=tmp_path/'c', num_workers=0, device='cpu', batch_tfms=None)
    monkeypatch.chdir(there)
    assert torch.equal(was.as_subclass(torch.Tensor), dls.valid.one_batch()[0].as_subclass(torch.Tensor))

def test_relative_names_of_a_comparison(relative, monkeypatch):
    df,there,tmp = relative
    df = df.assign(image='data/'+df.image, mask='data/'+df['mask'])
    kw = dict(codes=CODES, folds=2, budget=dict(updates=1), nf=4, depth=2, cache=tmp/'cache', **QUIET)
    c = Comparison(df, {'3D':dict(ndim=3)}, path='runs', **kw)
    v = cross_validation(df, tmp, CODES)
    monkeypatch.chdir(there)
    c.run()
    v.run()
    assert not (there/'runs').exists() and not (there/'cv').exists() and (c.results.target_mm3
                                                >0).all() and (v.results.target_mm3>0).all()

def cross_validation(df, tmp, codes):
    return CrossValidation(df, 2, path='cv', codes=codes, budget=dict(updates=1), nf=4, depth=2, cache=tmp/'cache',
                           **QUIET)

def test_a_report_of_relative_names_shows_them_later(relative, monkeypatch):
    df,there,tmp = relative
    r = check_dataset(df, CODES, 'data')
    monkeypatch.chdir(there)
    assert all(str(f[0]).startswith(str(tmp/'here')) for f in r.facts.image)

def test_tables_of_relative_folders_hold_whole_names(relative, monkeypatch):
    df,there,tmp = relative
    t = scan_folder('data', 'images/*.nii', 'labels/*.nii')
    monkeypatch.chdir(there)
    assert all(Path(f).is_absolute() and Path(f).is_relative_to(tmp/'here') for f in [*t.image, *t['mask']])

def decathlon(path, df, **info):
    (path/'dataset.json').write_text(json.dumps(dict(labels={'0':'background','1':'large','2':'small'},
            modality={'0':'MRI'},
        training=[dict(image=f'./{r.image}', label=f"./{r['mask']}") for _,r in df.iterrows()], **info)))

def test_from_folder_and_from_decathlon_take_relative_folders(relative):
    df,there,tmp = relative
    decathlon(Path('data'), df)
    for dls in (VolumeDataLoaders.from_folder('data', 'images/*.nii', 'labels/*.nii', codes=CODES, cache=tmp/'c',
            **QUIET), VolumeDataLoaders.from_decathlon('data', cache=tmp/'c', **QUIET),
                SliceDataLoaders.from_decathlon('./data/../data', cache=tmp/'c', **QUIET)):
        assert len(dls.train_ds)+len(dls.valid_ds)==4 and dls.codes==CODES

# --- marks and columns

@pytest.mark.parametrize('marks,case', [([0,1,2,0], "'c2': v is 2"), ([True,False,None,True], "'c2'"),
        ([0.,1.,float('nan'),0.], "'c2': v is nan"), (['True','False','True','False'], "'c0': v is 'True'"),
        ([0,1,.5,0], "'c2'")])
def test_valid_col_takes_marks_alone(relative, marks, case):
    df,_,tmp = relative
    df = df.assign(v=marks, label=list('abab'))
    for f in (lambda: VolumeDataLoaders.from_df(df, path='data', codes=CODES, valid_col='v', cache=tmp/'c', **QUIET),
              lambda: VolumeDataLoaders.from_df(df, path='data', label_col='label', valid_col='v', cache=tmp/'c',
                                                num_workers=0, device='cpu'),
              lambda: RadiographDataLoaders.from_df(df, path='data', valid_col='v', cache=tmp/'c'),
              lambda: label_efficiency(df, sizes=(1,), valid_col='v', path=tmp/'e')):
        with pytest.raises(InputError) as e: f()
        assert case in str(e.value)

@pytest.mark.parametrize('marks', [[True,False,False,True], [1,0,0,1], [1.,0.,0.,1.], np.array([1,0,0,1], np.uint8),
        pd.array([True,False,False,True], 'boolean'), pd.array([1,0,0,1], 'Int64')])
def test_valid_col_takes_each_kind_of_mark(relative, marks):
    df,_,tmp = relative
    dls = VolumeDataLoaders.from_df(df.assign(v=marks), path='data', codes=CODES, valid_col='v', cache=tmp/'c', **QUIET)
    assert dls.valid_ds.items.case.tolist()==['c0','c3']

def test_a_column_that_stands_twice_is_refused(relative):
    df,_,tmp = relative
    for col in ('image','mask','case','subject'):
        d = pd.concat([df, df[[col]]], axis=1).assign(label=1)
        for f in (lambda: VolumeDataLoaders.from_df(d, path='data', codes=CODES, cache=tmp/'c', **QUIET),
                lambda: RadiographDataLoaders.from_df(d, path='data', cache=tmp/'c'),
                  lambda: check_dataset(d, CODES, 'data'), lambda: find_leaks(d, 'data'),
                lambda: Comparison(d, path=tmp/'x'), lambda: cross_validation(d, tmp, CODES),
                  lambda: label_efficiency(d, path=tmp/'e')):
            with pytest.raises(InputError) as e: f()
            assert f'two columns {col!r}' in str(e.value)

def test_a_column_that_stands_twice_is_refused_in_evaluation(learner, study):
    df = study[1]
    with pytest.raises(InputError, match="two columns 'image'"):
        learner(3).evaluate(pd.concat([df, df[['image']]], axis=1))

# --- layouts, and what is no file

def test_a_folder_that_pairs_nothing_says_so(tmp_path):
    write_case(tmp_path, 'a_T1')
    (tmp_path/'labels'/'a_T1.nii').rename(tmp_path/'labels'/'a_seg.nii')
    with pytest.raises(InputError) as e: scan_folder(tmp_path, 'images/*.nii', 'labels/*.nii')
    for s in ("'a_T1'","'a_seg'",'masks=None'): assert s in str(e.value)
    assert len(scan_folder(tmp_path, 'images/*.nii', masks=None))==1

def nnunet(path, names=('x','y'), channels=2, labels=None, **info):
    for s in ('imagesTr','labelsTr'): (path/s).mkdir(parents=True)
    for n in names:
        for c in range(channels):
            nib.save(nib.Nifti1Image(np.random.default_rng(c).random((6,6,6)).astype(np.float32), np.eye(4)),
                     path/'imagesTr'/f'{n}_{c:04d}.nii.gz')
        nib.save(nib.Nifti1Image((np.indices((6,6,6))[0]>3).astype(np.uint8), np.eye(4)), path/'labelsTr'/f'{n}.nii.gz')
    (path/'dataset.json').write_text(json.dumps(dict(channel_names={str(c):f'm{c}' for c in range(channels)},
                                                     labels=labels or dict(background=0, lesion=1),
                                                     numTraining=len(names), file_ending='.nii.gz', **info)))
    return path

@pytest.mark.parametrize('channels', [1,2])
def test_an_nnunet_data_set_is_read(tmp_path, channels):
    df = scan_decathlon(nnunet(tmp_path/'Dataset001_X', channels=channels))
    assert df.case.tolist()==['x','y'] and df.attrs['codes']==['background',
            'lesion'] and df.attrs['modality']==[f'm{c}' for c in range(channels)]
    names = [[Path(f).name for f in o] if isinstance(o, list) else Path(o).name for o in df.image]
    assert names[0]==('x_0000.nii.gz' if channels==1
            else ['x_0000.nii.gz','x_0001.nii.gz']) and Path(df['mask'][1]).name=='y.nii.gz'
    dls = VolumeDataLoaders.from_df(df, valid_pct=.5, cache=tmp_path/'c', **{**QUIET, 'patch':4})
    assert dls.one_batch()[0].shape[1]==channels

def test_an_nnunet_data_set_with_regions_or_without_files_says_so(tmp_path):
    df = scan_decathlon(nnunet(tmp_path/'r', labels={'background':0, 'whole':[1,2], 'core':[2]}))
    with pytest.raises(InputError, match="'whole' and 'core'"):
        VolumeDataLoaders.from_df(df, cache=tmp_path/'c', **QUIET)
    with pytest.warns(UserWarning, match='1 of the 3 cases'):
        (p:=nnunet(tmp_path/'m')/'dataset.json').write_text(p.read_text().replace('"numTraining": 2',
                '"numTraining": 3'))
        scan_decathlon(tmp_path/'m')
    os.remove(tmp_path/'m'/'imagesTr'/'x_0001.nii.gz')
    with pytest.raises(InputError, match="'x'.*2 channels"): scan_decathlon(tmp_path/'m')

def test_another_dataset_json_is_named(tmp_path):
    (tmp_path/'dataset.json').write_text('{"name": "x"}')
    with pytest.raises(FileError) as e: scan_decathlon(tmp_path)
    assert 'training' in str(e.value) and 'ownload' not in str(e.value)

def test_cifti_is_named(tmp_path):
    from nibabel import cifti2
    ax = cifti2.ScalarAxis(['a','b']), cifti2.BrainModelAxis.from_mask(np.ones((3,1,1)), affine=np.eye(4))
    nib.save(nib.Cifti2Image(np.zeros((2,3), np.float32), cifti2.Cifti2Header.from_axes(ax)), tmp_path/'x.dscalar.nii')
    for f in (load_volume, load_mask, read_header):
        with pytest.raises(InputError) as e: f(tmp_path/'x.dscalar.nii')
        assert 'CIFTI' in str(e.value) and 'x.dscalar.nii' in str(e.value) and 'truncated' not in str(e.value)

@pytest.mark.parametrize('f', [load_volume, load_mask, read_header])
def test_what_is_no_file_is_named(f):
    for o,says in ((None,'None'), (3,'3'), (np.zeros((4,5,6)),'(4, 5, 6)'), (torch.zeros(4,5,6),'(4, 5, 6)'),
            ([None],'None')):
        with pytest.raises(ArgumentError) as e: f(o)
        assert says in str(e.value)

def test_an_image_of_nibabels_is_taken(tmp_path, learner):
    row = write_case(tmp_path, 'a', affine_of('LPS', (1,1.2,2), (3,-4,5)), (10,12,14))
    for im in (nib.load(tmp_path/row['image']), nib.Nifti1Image(np.asarray(nib.load(tmp_path/row['image']).dataobj),
            nib.load(tmp_path/row['image']).affine)):
        t,want = load_volume(im),load_volume(tmp_path/row['image'])
        assert torch.equal(t.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor)) and np.array_equal(t.affine,
                want.affine) and read_header(im)['shape']==(10,12,14)
        assert load_volume([im, tmp_path/row['image']]).shape[0]==2
    assert torch.equal(load_mask(nib.load(tmp_path/row['mask'])).as_subclass(torch.Tensor),
            load_mask(tmp_path/row['mask']).as_subclass(torch.Tensor))
    learn = learner(3)
    a,b = learn.predict_volume(im),learn.predict_volume(tmp_path/row['image'])
    assert torch.equal(a.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor)) and torch.equal(learn.predict(im)[1],
            learn.predict(tmp_path/row['image'])[1])

# --- names of cases

@pytest.fixture
def named(tmp_path):
    """Write files of these names, images into `images` and masks into `labels` below a folder each:
    {'a/images/1.nii.gz': …}"""
    im,m = phantom((6,6,6))
    def write(*names):
        for n in names:
            (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
            nib.save(m if 'labels' in n else im, tmp_path/n)
        return tmp_path
    return write

@pytest.mark.parametrize('names,kw', [
    (['a/images/1.nii.gz', 'b/images/1.nii.gz', 'labels/1.nii.gz'], dict(images='*/images/*', masks='labels/*')),
    (['images/1.nii', 'images/1.nii.gz', 'labels/1.nii.gz'], dict(images='images/*')),
    (['images/1.nii.gz', 'labels/1.nii', 'labels/1.nii.gz'], dict(masks='labels/*'))])
def test_two_files_of_one_name_are_no_channels(named, names, kw):
    "They were: two patients as two channels, with the mask of the last"
    with pytest.raises(InputError, match="several files.*(images|labels)/1"): scan_folder(named(*names), **kw)

@pytest.mark.parametrize('names', [('1_0000','1_0002','2_0000','2_0001'), ('1_0000','2_0001'), ('1','1_0000','2')])
def test_channels_of_other_numbers_are_refused(named, names):
    path = named('labels/1.nii.gz', 'labels/2.nii.gz', *(f'images/{o}.nii.gz' for o in names))
    with pytest.raises(InputError, match="case '[12]' has (channel|several files)"): scan_folder(path)

def test_a_pair_of_files_is_one_scan(named):
    df = scan_folder(named('images/1.img', 'labels/1.img'), 'images/*', 'labels/*')
    assert [df.image[0].name, df['mask'][0].name]==['1.hdr']*2

def test_an_umlaut_of_two_signs_is_one_of_one_sign(named):
    "macOS writes names in two signs (NFD), everybody else in one"
    path = named('images/Mu\u0308ller.nii.gz', 'labels/M\u00fcller.nii.gz')
    (path/'cases.csv').write_text('case,subject\nMu\u0308ller,s1\n', encoding='utf-8')
    df = scan_folder(path)
    assert len(df)==1 and df['mask'].notna().all() and df.subject.tolist()==['s1']

@pytest.mark.parametrize('table', ['case;subject\n1;s\n2;s\n', 'Case,Subject\n1,s\n2,s\n'])
def test_a_table_of_cases_that_is_not_understood_is_refused(named, table):
    "It was passed over, and with it the subjects: both scans of one could stand on both sides of a split"
    path = named(*(f'{d}/{i}.nii.gz' for d in ('images','labels') for i in (1,2)))
    (path/'cases.csv').write_text(table)
    with pytest.raises(InputError, match="expected a table with a column 'case'"): scan_folder(path)

def test_spaces_behind_commas_are_no_part_of_a_name(named):
    path = named(*(f'{d}/{i}.nii.gz' for d in ('images','labels') for i in (1,2)))
    (path/'cases.csv').write_text('case, subject\n1, s\n2, s\n')
    assert scan_folder(path).subject.tolist()==['s','s']

# --- units of other formats

@pytest.mark.parametrize('line', ['space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\nspace '
                                  'origin: (0,0,0)\nspace units: "{0}" "{0}" "{0}"',
                                  'spacings: 1 1 1\nunits: "{0}" "{0}" "{0}"'])
@pytest.mark.parametrize('unit', ['um','\u00b5m','m','microns','mm'])
def test_the_unit_of_a_nrrd_file_is_mm_or_refused(tmp_path, line, unit):
    "It was passed over, and a mouse was as large as a house"
    head = f'NRRD0005\ntype: short\ndimension: 3\nsizes: 3 4 5\nencoding: raw\nendian: little\n{line.format(unit)}\n\n'
    (tmp_path/'a.nrrd').write_bytes(head.encode()+bytes(120))
    if unit=='mm': assert load_volume(tmp_path/'a.nrrd').spacing==(1,1,1)
    else:
        with pytest.raises(InputError, match=f"a.nrrd: its lengths are in '{unit}'; expected mm"):
            load_volume(tmp_path/'a.nrrd')

def test_the_unit_of_a_metaimage_is_mm_or_refused(tmp_path):
    (tmp_path/'a.raw').write_bytes(bytes(120))
    for unit in ('mm','um'):
        (tmp_path/'a.mhd').write_text(f'ObjectType = Image\nNDims = 3\nDimSize = 3 4 5\nElementType = '
                                      f'MET_SHORT\nDistanceUnits = {unit}\nElementDataFile = a.raw\n')
        if unit=='mm': assert load_volume(tmp_path/'a.mhd').shape==(1,3,4,5)
        else:
            with pytest.raises(InputError, match="'um'; expected mm"): load_volume(tmp_path/'a.mhd')
