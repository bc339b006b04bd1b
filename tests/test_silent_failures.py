"Wrong answers given without a word elsewhere in this field: what happens here instead."
import json
import os
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import *
from torch import Tensor, nn

from fastmed.all import *
from fastmed.predict.windows import apply_post, keep_largest

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)
EXACT = dict(codes=CODES, spacing=None, patch=16, normalize='none', batch_tfms=None, bs=2, samples_per_case=1, **QUIET)

@pytest.fixture
def exact(study, cache):
    "`exact(cls, …)` gives a Learner that is right without training; arguments go to `from_df`."
    path,df = study
    def make(ndim=3, arch=Nearest, **kwargs):
        kw = {**EXACT, **dict(path=path, valid_pct=.25, cache=cache), **({'axis':2} if ndim==2 else {}), **kwargs}
        dls = (VolumeDataLoaders if ndim==3 else SliceDataLoaders).from_df(kw.pop('df', df), **kw)
        return (unet3d_learner if ndim==3 else unet2d_learner)(dls, arch)
    return make

def row(path, df):
    "A DataFrame of one case, with whole paths"
    return pd.DataFrame([{**r, 'image':str(path/r['image']), 'mask':str(path/r['mask'])} for r in df])

def dice_of(learn, df): return pd.DataFrame(learn.evaluate(df)).groupby('structure').dice.mean()

# ---- 1 to 3

@pytest.mark.parametrize('ndim', (3,2))
def test_row_01_fresh_process_keeps_the_preprocessing(fresh, ndim):
    """A Learner that is loaded elsewhere still turns and resamples a scan as in training: the scan here has other axes
    and another spacing."""
    here,there = fresh
    assert json.loads(str(there[f'pre_{ndim}']))['spacing']==[1.25]*3 and json.loads(str(there[f'pre_{ndim}']))[
            'orientation']=='RAS'
    for k in ('volume','proba','decoded','preds'):
        assert here[f'{k}_{ndim}'].tobytes()==there[f'{k}_{ndim}'].tobytes(), k
    assert here[f'volume_{ndim}'].shape==(34,22,15) and here[f'volume_{ndim}'].any()

def test_row_01_export_holds_everything(learner, study):
    """Patch, spacing, orientation, normalisation with its numbers, and codes are inside the exported file; the cases
    are not."""
    path,df = study
    learn = learner(3)
    learn.export('m.pkl')
    new = load_learner(learn.path/'m.pkl')
    assert new.dls.preprocess==learn.dls.preprocess and dict(new.dls.plan)==dict(
            learn.dls.plan) and new.dls.codes==CODES and len(new.dls.valid_ds)==0
    assert torch.equal(new.predict_volume(path/df.image[2]), learn.predict_volume(path/df.image[2]))

def test_row_01_export_needs_no_store(exact, study, cache):
    "Where the store of the training machine is not there, the answers are the same."
    import shutil
    path,df = study
    learn = exact(3, spacing=1.3, normalize='zscore')
    learn.path = cache.parent
    learn.export('m.pkl')
    files = [path/o for o in df.image[:3]]
    want = learn.get_preds(dl=learn.dls.test_dl(files))[0]
    shutil.rmtree(cache)
    new = load_learner(cache.parent/'m.pkl')
    assert torch.equal(new.get_preds(dl=new.dls.test_dl(files))[0], want) and not cache.exists()

def test_row_02_two_pipelines_do_not_touch(exact, study, cache):
    "Making a second pipeline leaves the settings of the first as they were, and its batches and predictions too."
    path,df = study
    a = exact(3, spacing=1., patch=16)
    state = lambda l: (repr(l.dls.preprocess), dict(l.dls.plan), l.dls.valid.one_batch()[0].as_subclass(Tensor),
                       l.predict_volume(path/df.image[2]).as_subclass(Tensor))
    before = state(a)
    b = exact(3, spacing=3., patch=8, normalize='zscore', codes=['x','y','z'])
    b.predict_volume(path/df.image[2])
    b.dls.one_batch()
    for x,y in zip(before, state(a)): assert torch.equal(x, y) if isinstance(x, Tensor) else x==y
    p = Preprocess(spacing=1.)
    assert p.spacing==(1.,1.,1.) and Preprocess().spacing is None

WORKERS = """
import sys, torch, hashlib, json
from fastmed.all import *
import torch.multiprocessing as mp
def digest(dl):
    return hashlib.sha256(b''.join(t.as_subclass(Tensor).numpy().tobytes() for b in dl for t in b)).hexdigest()
if __name__=='__main__':
    torch.set_num_threads(1)
    path,tmp = sys.argv[2],sys.argv[1]
    df = pd.read_csv(f'{path}/cases.csv')
    res = {}
    dls = VolumeDataLoaders.from_df(df, path, codes=['background','large','small'], spacing=1.5, patch=12,
                                    normalize='minmax', batch_tfms=None, bs=2, samples_per_case=2, cache=tmp,
                                    device='cpu', num_workers=0)
    mp.set_forkserver_preload(['fastmed.all'])
    for how,n in (('none',0),('fork',2),('forkserver',2),('spawn',1)):
        if n: mp.set_start_method(how, force=True)
        set_seed(5)
        for d in dls.loaders: d.rng = random.Random(5)
        tr,va = [d.new(num_workers=n) for d in dls.loaders]
        tr.rng = random.Random(5)
        test = dls.test_dl(df[:3].assign(image=[f'{path}/{o}' for o in df.image[:3]]), num_workers=n)
        # a spawned worker takes seconds to start
        res[how] = [digest(o) for o in ((tr,va,test) if how!='spawn' else (tr,))]
    print(json.dumps(res))
"""

def test_row_03_workers_keep_the_settings(study, tmp_path):
    """However the workers are started, or with none, the batches are the same to the last bit: of training, of
    validation and of new files."""
    res = json.loads(python(WORKERS, tmp_path, study[0]).strip().splitlines()[-1])
    assert set(res)=={'none','fork','spawn','forkserver'} and len(set(res['none']))==3
    for how in ('fork','forkserver','spawn'): assert res[how]==res['none'][:len(res[how])], how

# ---- 4 to 7

@pytest.mark.parametrize('ndim', (3,2))
def test_row_04_each_case_keeps_its_affine(exact, study, ndim):
    "One Learner, one scan after another: each mask has the affine of its own scan, and the second time too."
    path,df = study
    learn = exact(ndim)
    for i in (0,1,2,3,0):
        m,im = learn.predict_volume(path/df.image[i]),nib.load(path/df.image[i])
        assert np.array_equal(m.affine, im.affine) and tuple(m.shape)==im.shape
    affs = [learn.dls.store.image(str(path/o)).affine for o in df.image]
    assert len({a.tobytes() for a in affs})==8
    xs = [learn.dls.train_ds[i][0] for i in range(3)]
    assert len({x.affine.tobytes() for x in xs})==3

@pytest.mark.parametrize('ndim', (3,2))
@pytest.mark.parametrize('shape', [(60,51,44),(10,41,12),(9,9,9)], ids=['larger','mixed','smaller'])
def test_row_05_whole_scan_is_covered(exact, tmp_path, ndim, shape):
    """A structure that fills a scan of any size keeps every voxel: nothing is cropped to the patch of training, nothing
    filled with zeros."""
    two = lambda a: np.full_like(a, 2)
    c = write_case(tmp_path, 'big', shape=shape, image=two, mask=two)
    for overlap in (0,.5): assert (exact(ndim).predict_volume(tmp_path/c['image'], overlap=overlap)==2).all()

def test_row_06_mask_in_another_order(exact, tmp_path, cache):
    """A mask whose file runs from right to left is brought to the image's order by its own affine: Dice stays 1. Out of
    place in space, both files are named."""
    flip = nib.orientations.axcodes2ornt('LAS')
    rows = []
    for i in range(3):
        r = write_case(tmp_path, f'm{i}', affine_of('RAS', (1,1,1), (3,4,5)), (20,22,18))
        m = nib.load(tmp_path/r['mask']).as_reoriented(flip)
        m = nib.Nifti1Image(np.asarray(m.dataobj).copy(), m.affine)
        assert nib.aff2axcodes(m.affine)==('L','A','S')
        nib.save(m, tmp_path/r['mask'])
        rows.append(r)
    df = pd.DataFrame(rows)
    learn = exact(3, df=df, path=tmp_path)
    for dl in learn.dls.loaders:
        for x,y in dl:
            assert torch.equal(x[:,0].round().as_subclass(Tensor).long(),
                               y.as_subclass(Tensor).long()), 'image and mask of a patch belong together'
    assert (dice_of(learn, row(tmp_path, rows))==1).all()
    m = nib.load(tmp_path/rows[0]['mask'])
    nib.save(nib.Nifti1Image(np.array(m.dataobj), nib.load(tmp_path/rows[0]['image']).affine@np.diag([-1,1,1,1])),
            tmp_path/rows[0]['mask'])
    with pytest.raises(ValueError, match=r'(?s)images/m0\.nii.*labels/m0\.nii'): exact(3, df=df, path=tmp_path)

@pytest.mark.parametrize('ndim', (3,2))
def test_row_07_flips_are_undone(exact, study, ndim):
    """Averaging over flips changes nothing for a network that answers voxel by voxel; for one that knows left from
    right each view is undone before the mean."""
    path,df = study
    fn = path/df.image[2]
    learn = exact(ndim)
    axes = (0,1,2) if ndim==3 else (0,1)
    m,p = learn.predict_volume(fn, proba=True)
    n,q = learn.predict_volume(fn, proba=True, tta=axes)
    assert torch.equal(m, n) and torch.allclose(p, q, atol=2e-3) and torch.equal(m,
            load_mask(path/df['mask'][2]).to(m.dtype))
    for a in axes: assert torch.equal(m, learn.predict_volume(fn, tta=a))
    learn.dls.train.after_batch.add(SpatialTfm(flips=(0,1)))
    a,t = learn.tta()
    b,u = learn.get_preds()
    assert torch.equal(t, u) and torch.allclose(a, b, atol=1e-5)

def test_row_07_views_by_hand(exact, study):
    "The mean over two views is what one gets by flipping the scan, predicting, flipping back and averaging."
    path,df = study
    learn = exact(3, arch=Edge, patch=24, normalize='none')
    x = load_volume(path/df.image[0])
    _,p = learn.predict_volume(x, proba=True)
    _,q = learn.predict_volume(x, proba=True, tta=0)
    back = TensorVolume(x.as_subclass(Tensor).flip(1), affine=x.affine)
    _,f = learn.predict_volume(back, proba=True)
    lp = (p.as_subclass(Tensor).clamp_min(1e-6).log()+f.as_subclass(Tensor).flip(1).clamp_min(1e-6).log())/2
    inner = (slice(None),slice(4,-4),slice(None),slice(None))
    assert (lp.softmax(0)-q.as_subclass(Tensor))[inner].abs().max()<.02 and not torch.allclose(p, q, atol=.1)

# ---- 8

def test_row_08_nothing_passed_is_dropped(study, cache):
    "A folder, a splitter by column and batch transforms reach the batch; a splitter function is refused by name."
    path,df = study
    class Nine(Transform):
        split_idx = None
        def encodes(self, o:TensorVolume): return o*0+9
    for cls,kw in ((VolumeDataLoaders,{}),(SliceDataLoaders,dict(axis=2))):
        make = lambda **k: cls.from_df(df.assign(held=[i<2 for i in range(8)]),
                                       **{**EXACT, **dict(path=path, cache=cache), **kw, **k})
        assert make(valid_col='held').valid_ds.items.case.tolist()==['c0','c1']!=make().valid_ds.items.case.tolist()
        assert all(isinstance(t, Transform)
                for t in make(batch_tfms=volume_tfms(max_rotate=3)).train.after_batch.fs) and any(getattr(t,
                'max_rotate',None)==3 for t in make(batch_tfms=volume_tfms(max_rotate=3)).train.after_batch.fs)
        for k,v in dict(splitter=RandomSplitter(), batch_tfm=[Nine()], folder=path, get_y=noop, tfms=None,
                        shuffle=False).items():
            with pytest.raises(TypeError, match=k): make(**{k:v})
        with pytest.raises(FileNotFoundError): make(path=path/'elsewhere')
    assert (VolumeDataLoaders.from_df(df,
                                      **{**EXACT, **dict(path=path, cache=cache, batch_tfms=[Nine()])}).one_batch()[0]
                                      ==9).all()

# ---- 9 to 12, 14

def test_row_09_perfect_sigmoid_scores_one(exact, study, tmp_path):
    "A network with one channel that is right at every voxel has Dice 1: as a metric, as a loss and over whole scans."
    one = lambda m: (m>0).astype(np.uint8)
    rows = [write_case(tmp_path, f'b{i}', seed=i, image=lambda a: (a>.5).astype(np.float32), mask=one)
                       for i in range(4)]
    class Sigmoid(nn.Module):
        def __init__(self, n_in, n_out, ndim=3):
            super().__init__()
            self.w,self.divisor,self.n_out = nn.Conv3d(1,1,1),(1,1,1),n_out
            nn.init.constant_(self.w.weight, 40.)
            nn.init.constant_(self.w.bias, -20.)
        def forward(self, x): return self.w(x)
    dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), tmp_path,
            **{**EXACT, 'codes':['background','lesion'], 'cache':tmp_path/'c'})
    learn = unet3d_learner(dls, Sigmoid, n_out=1, fast=False)
    with learn.no_bar(): loss,*dice = learn.validate()
    assert dice==[1.,1.] and loss<1e-3
    assert (dice_of(learn, row(tmp_path, rows))==1).all()
    p,t,d = learn.get_preds(with_decoded=True)
    assert torch.equal(d.long(), t.long())
    m,pr = learn.predict_volume(tmp_path/rows[0]['image'], proba=True)
    assert len(pr)==2 and torch.equal(pr.argmax(0), m.long())

def test_row_10_empty_structures_follow_a_rule(exact, tmp_path):
    """Voxels predicted where there is nothing score 0 and count as failed; nothing predicted where there is nothing is
    nan, and counted apart."""
    assert np.isnan(dice_score(np.zeros((3,3,3),bool), np.zeros((3,3,3),bool))) and dice_score(np.ones((3,3,3),bool),
            np.zeros((3,3,3),bool))==0
    no2,no2i = lambda m: np.where(m==2, 0, m),lambda a: np.where(a>1.5, 0, a)
    rows = [write_case(tmp_path, 'right'), write_case(tmp_path, 'false', mask=no2),
            write_case(tmp_path, 'none', image=no2i, mask=no2)]
    ev = exact(3).evaluate(row(tmp_path, rows))
    s = ev.summary()
    assert pd.DataFrame(ev).query("structure=='small'").status.tolist()==['ok','false positive','empty']
    assert s.loc['small','mean']==.5 and s.loc['small',['n','failed','empty']].tolist()==[3,1,1]

def test_row_11_surface_distance_per_structure():
    "Label 1 against label 2 is no agreement: each structure is compared with itself."
    a,b = np.zeros((12,12,12),np.uint8),np.zeros((12,12,12),np.uint8)
    a[2:5,2:5,2:5],b[2:5,2:5,2:5] = 1,2
    for r in case_scores(a, b, CODES, (1,1,1)):
        assert r['dice']==0 and r['hd95']==np.inf and r['nsd']==0 and r['status'] in ('missed','false positive')
    for f in (partial(hausdorff95, spacing=(1,1,1)), partial(surface_dice, spacing=(1,1,1)), dice_score):
        with pytest.raises(ValueError, match='several|one structure'): f(a, b)
    a[8:10,8:10,8:10] = 2
    r = {o['structure']:o for o in case_scores(a, b, CODES, (1,1,2))}
    assert r['small']['hd95']>5 and r['large']['status']=='false positive'

def test_row_12_keep_largest_per_structure(exact, study):
    """Each structure keeps its own largest part: a small structure that touches nothing is not thrown away, two that
    touch are not one."""
    m = np.zeros((20,20,20), np.uint8)
    m[1:9,1:9,1:9],m[9:12,1:9,1:9],m[15:17,15:17,15:17],m[0,19,0] = 1,2,1,2
    want = m.copy()
    want[15:17,15:17,15:17] = 0
    want[0,19,0] = 0
    assert np.array_equal(keep_largest(m), want)
    far = np.zeros((20,20,20), np.uint8)
    far[1:9,1:9,1:9],far[15:18,15:18,15:18] = 1,2
    assert np.array_equal(keep_largest(far), far)
    t = TensorVolumeMask(torch.from_numpy(m), affine=np.eye(4))
    assert np.array_equal(apply_post(t, 'keep_largest').numpy(), want)
    path,df = study
    learn = exact(3)
    assert torch.equal(learn.predict_volume(path/df.image[0], post='keep_largest'),
                                            learn.predict_volume(path/df.image[0])), 'both balls stay'

def test_row_14_a_missed_structure_is_counted(exact, tmp_path):
    """A structure that was not found has an infinite distance: it leaves no mean by stealth, the summary says how many
    failed."""
    rows = [write_case(tmp_path, 'right'), write_case(tmp_path, 'missed', image=lambda a: np.where(a>1.5, 0, a))]
    ev = exact(3).evaluate(row(tmp_path, rows))
    r = pd.DataFrame(ev).set_index(['case','structure']).loc['missed','small']
    assert r.status=='missed' and r.dice==0 and r.hd95==np.inf and r.nsd==0
    for score in ('dice','hd95','nsd'):
        s = ev.summary(score)
        assert s.loc['small',['n','failed']].tolist()==[2,1] and s.loc['all','failed']==1

def test_row_14_an_unreadable_scan_is_counted(exact, tmp_path):
    "So does a scan that could not be predicted at all, with Dice 0."
    rows = [write_case(tmp_path, 'right'), write_case(tmp_path, 'broken')]
    (tmp_path/rows[1]['image']).write_bytes(b'x')
    s = exact(3).evaluate(row(tmp_path, rows)).summary()
    assert s.loc['small',['n','failed']].tolist()==[2,1] and s.loc['large','mean']==.5

# ---- 13, 15 to 17

def test_row_13_unlike_shapes_are_refused(study, tmp_path):
    """Image and mask of unlike shape are refused with both names and shapes: by from_df, by a plain DataBlock, and by
    evaluation."""
    rows = [write_case(tmp_path, f'g{i}') for i in range(3)]+[write_case(tmp_path, 'bad', mask=lambda m: m[:,:-2])]
    parts = ('images/bad.nii','labels/bad.nii','(20, 20, 20)','(20, 18, 20)')
    block = DataBlock((VolumeBlock, VolumeMaskBlock(CODES)), get_x=CaseFiles('image', tmp_path),
            get_y=CaseFiles('mask', tmp_path), splitter=IndexSplitter([0]), item_tfms=PatchTransform((8,8,8)))
    df = pd.DataFrame(rows)
    good = VolumeDataLoaders.from_df(df[:3], tmp_path, **{**EXACT, 'cache':tmp_path/'c'})
    for f in (lambda: VolumeDataLoaders.from_df(df, tmp_path, cache=tmp_path/'c', **QUIET),
                                                lambda: list(block.dataloaders(df, bs=1, **QUIET).train),
                                                lambda: unet3d_learner(good,
            Nearest).evaluate(row(tmp_path, rows[3:]))):
        with pytest.raises(ValueError) as e: f()
        for p in parts: assert p in str(e.value), f'{p} is not in: {e.value}'
    with pytest.raises(ValueError, match=r'\(3, 3, 3\).*\(3, 3, 4\)'):
        case_scores(np.zeros((3,3,3),int), np.zeros((3,3,4),int), CODES, (1,1,1))

def hounsfield(k, a): return np.round(a*300*k-1000).astype(np.float32)

def test_row_15_statistics_come_from_training_cases(tmp_path):
    """The scans of the validation cases are a thousand times brighter and twice as coarse: neither the intensity
    statistics nor the spacing know."""
    def ct(k): return partial(hounsfield, k)
    rows = [write_case(tmp_path, f't{i}', seed=i, image=ct(1)) for i in range(3)]+[write_case(tmp_path, f'v{i}',
            affine_of(spacing=(2,2,2)), seed=i, image=ct(3)) for i in range(4)]
    df = pd.DataFrame(rows).assign(v=[False]*3+[True]*4)
    make = lambda d,c,**k: VolumeDataLoaders.from_df(d, tmp_path, codes=CODES, valid_col='v', patch=8, cache=tmp_path/c,
                                                     **QUIET, **k)
    for norm in ('ct','auto'):
        pre = make(df, 'a', normalize=norm).preprocess
        assert pre.normalize=='ct' and pre.spacing==(1.,1.,1.) and pre.stats[0]['hi']<0, pre
        want = Preprocess('auto', norm, codes=CODES).fit([str(tmp_path/r['image']) for r in rows[:3]],
                [str(tmp_path/r['mask']) for r in rows[:3]])
        assert pre==want
    other = df.copy()
    other['image'] = [*df.image[:3],*df.image[[4,3,6,5]]]
    assert make(other, 'b', normalize='ct').preprocess==make(df, 'a', normalize='ct').preprocess
    a,b = [make(df.assign(v=v), 'a', normalize='ct', spacing=1.).preprocess.stats for v in (df.v, ~df.v)]
    assert a!=b, 'in one store, other training cases have statistics of their own'

def test_row_16_subject_on_one_side(study, cache):
    """Where there is a subject column it groups the split, unasked; a validation column that parts a subject is refused
    by name."""
    path,df = study
    for seed in range(6):
        dls = VolumeDataLoaders.from_df(df, **{**EXACT, **dict(path=path, cache=cache, seed=seed, valid_pct=.4)})
        assert not set(dls.train_ds.items.subject) & set(dls.valid_ds.items.subject)
    with pytest.raises(ValueError, match='s0'):
        VolumeDataLoaders.from_df(df.assign(v=[i==0 for i in range(8)]),
                **{**EXACT, **dict(path=path, cache=cache, valid_col='v')})

def test_row_16_hippocampus_pairs(data):
    "The two hippocampi of one scan, cases 2k-1 and 2k, stay together."
    df = scan_decathlon(data/'hippocampus')
    splits = [GroupSplitter(df.subject, .2, s)(df) for s in range(5)]
    assert all(not set(df.subject[list(a)])&set(df.subject[list(b)]) and abs(len(b)/len(df)-.2)<.05 for a,b in splits)

@pytest.mark.parametrize('values', [(0,1,255),(0,500,600)])
def test_row_17_labels_are_declared_or_refused(tmp_path, values):
    "Odd values are no class ids: they are mapped by the codes that declare them, or refused with the values found."
    lut = lambda m: np.array(values, np.int16)[m]
    df = pd.DataFrame([write_case(tmp_path, f'l{i}', mask=lut) for i in range(3)])
    make = lambda **k: VolumeDataLoaders.from_df(df, tmp_path, **{**EXACT, 'cache':tmp_path/'c', 'patch':20, **k})
    for codes in (None, CODES):
        with pytest.raises(ValueError) as e: make(codes=codes)
        for v in values[2:] if codes else values: assert str(v) in str(e.value), e.value
        assert 'codes=' in str(e.value)
    dls = make(codes=dict(zip(CODES, values)))
    assert dls.codes==CODES
    for x,y in dls.train: assert torch.equal(x[:,0].round().long().as_subclass(Tensor), y.long().as_subclass(Tensor))
    assert (dice_of(unet3d_learner(dls, Nearest), row(tmp_path, df.to_dict('records')))
            ==1).all(), 'evaluation maps them too'
    merged = make(codes={'background':0, 'all':list(values[1:])})
    assert merged.c==2 and set(np.unique(merged.train_ds[0][1].numpy()))=={0,1}
    block = DataBlock((VolumeBlock, VolumeMaskBlock), get_x=CaseFiles('image', tmp_path),
            get_y=CaseFiles('mask', tmp_path), splitter=IndexSplitter([0]), item_tfms=PatchTransform((8,8,8)))
    with pytest.raises(ValueError, match=str(values[2])): list(block.dataloaders(df, bs=1, **QUIET).train)

# ---- 18, 19

@pytest.mark.parametrize('n_in', [1,2,4,7])
def test_row_18_channels_are_adapted(n_in):
    """One channel takes the sum; more are repeated and rescaled: none starts at zero, and equal channels give what
    equal colours gave."""
    import timm
    torch.manual_seed(0)
    net = timm.create_model('resnet10t', features_only=True).eval()
    new = adapt_input(deepcopy(net), n_in)
    w = first(m for m in new.modules() if isinstance(m, nn.Conv2d)).weight
    assert w.shape[1]==n_in and all(float(w[:,i].abs().max())>1e-3 for i in range(n_in))
    x = torch.randn(1,1,64,64)
    with torch.no_grad():
        a,b = net(x.expand(-1,3,-1,-1)),new(x.expand(-1,n_in,-1,-1))
        assert all(float((p-q).abs().max())<=1e-5*max(1., float(p.abs().max())) for p,q in zip(a, b))
        for i in range(n_in):
            y = x.repeat(1,n_in,1,1)
            y[:,i] += 1.
            assert float((new(y)[0]-b[0]).abs().max())>1e-3, f'channel {i} is not seen'

@pytest.mark.parametrize('how', ['average','centre'])
def test_row_19_inflated_equals_its_parent(how):
    """On a volume constant along the third axis, the border repeated, the inflated network answers what its parent
    answers for the slice; with zeros around it does not."""
    import timm
    torch.manual_seed(0)
    net = timm.create_model('resnet10t', features_only=True).eval()
    x = torch.randn(1,3,64,64)
    v = x[...,None].repeat(1,1,1,1,32)
    with torch.no_grad():
        a,b,z = net(x),inflate(net, how=how)(v),inflate(net, how='average', padding='zeros')(v)
        assert all(float((q-p[...,None]).abs().max())<=1e-5*max(1., float(p.abs().max())) for p,q in zip(a, b))
        assert float((z[-1]-a[-1][...,None]).abs().max())>1e-3*float(a[-1].abs().max())

# ---- 20 to 24

def test_row_20_broken_voxels_do_not_train(tmp_path):
    "A truncated file and voxels that are no numbers stop the preparation, with the file's name."
    def bad(v):
        def f(a):
            a = a.copy()
            a[1,2,3] = v
            return a
        return f
    good = [write_case(tmp_path, f'g{i}') for i in range(3)]
    cut = write_case(tmp_path, 'cut')
    f = tmp_path/cut['image']
    f.write_bytes(f.read_bytes()[:-1000])
    for r,kind in ((cut,OSError),(write_case(tmp_path, 'nan', image=bad(np.nan)),ValueError),
            (write_case(tmp_path, 'inf', image=bad(np.inf)),ValueError)):
        with pytest.raises(kind, match=r['case']+r'\.nii'):
            VolumeDataLoaders.from_df(pd.DataFrame(good+[r]), tmp_path, **{**EXACT, 'cache':tmp_path/'c'})

def test_row_21_physical_values(exact, tmp_path):
    """Slope and intercept of the header are applied, in float: what is read is what the scanner meant, and nothing
    overflows."""
    raw = np.arange(8*8*8, dtype=np.uint8).reshape(8,8,8)
    im = nib.Nifti1Image(raw, np.eye(4))
    im.header.set_slope_inter(4, -1024)
    nib.save(im, tmp_path/'ct.nii')
    t = load_volume(tmp_path/'ct.nii')
    assert t.dtype==torch.float32 and np.array_equal(t[0].numpy(),
                                                     raw.astype(np.float32)*4-1024) and t.max()==255*4-1024
    full = nib.Nifti1Image(np.full((8,8,8), 250, np.uint8), np.eye(4))
    nib.save(full, tmp_path/'u8.nii')
    v = load_volume(tmp_path/'u8.nii')
    assert v.dtype==torch.float32 and (v+v).max().item()==500      # a tensor of uint8 that holds 244 "equals" 500
    r = write_case(tmp_path, 'scaled')
    src = nib.load(tmp_path/r['image'])
    q = nib.Nifti1Image(np.round((np.asarray(src.dataobj)+1)*50).clip(0,255).astype(np.uint8), src.affine)
    q.header.set_slope_inter(.02, -1)
    nib.save(q, tmp_path/r['image'])
    assert (dice_of(exact(3), row(tmp_path, [r]))==1).all(), 'stored as small integers, predicted as what they mean'
    m = nib.load(tmp_path/r['mask'])
    s = nib.Nifti1Image((np.asarray(m.dataobj)*2).astype(np.uint8), m.affine)
    s.header.set_slope_inter(.5, 0)
    nib.save(s, tmp_path/'m.nii')
    assert np.array_equal(load_mask(tmp_path/'m.nii').numpy(), np.asarray(m.dataobj))

def test_row_22_trailing_axes(exact, tmp_path):
    "A trailing axis of one is no fourth dimension; a real one is channels."
    r = write_case(tmp_path, 't')
    im,m = nib.load(tmp_path/r['image']),nib.load(tmp_path/r['mask'])
    a,b = np.asarray(im.dataobj),np.asarray(m.dataobj)
    for shape in ((20,20,20,1),(20,20,20,1,1)):
        nib.save(nib.Nifti1Image(a.reshape(shape), im.affine), tmp_path/'one.nii')
        nib.save(nib.Nifti1Image(b.reshape(shape), m.affine), tmp_path/'mask.nii')
        assert load_volume(tmp_path/'one.nii').shape==(1,20,20,20) and read_header(tmp_path/'one.nii')['shape']==(20,20,
                20) and load_mask(tmp_path/'mask.nii').shape==(20,20,20)
        assert (dice_of(exact(3), row(tmp_path, [dict(case='t', image='one.nii', mask='mask.nii')]))==1).all()
    nib.save(nib.Nifti1Image(np.stack([a,a+1,a+2], -1), im.affine), tmp_path/'three.nii')
    t = load_volume(tmp_path/'three.nii')
    assert t.shape==(3,20,20,20) and torch.allclose(t[2], t[0]+2) and read_header(tmp_path/'three.nii')['channels']==3
    for n,sl in (('vector',np.s_[...,None,:]),('after',np.s_[...,None])):
        nib.save(nib.Nifti1Image(np.stack([a,a+1,a+2], -1)[sl], im.affine), tmp_path/f'{n}.nii')
        assert torch.equal(load_volume(tmp_path/f'{n}.nii'), t) and read_header(tmp_path/f'{n}.nii')['channels']==3

def test_row_23_which_affine_counts(tmp_path):
    "Where sform and qform differ the stated rule holds, for header and voxels alike: sform when it is set, else qform."
    im = nib.Nifti1Image(np.zeros((4,5,6),np.float32), None)
    s,q = np.diag([1,2,3,1.]),np.diag([3,2,1,1.])
    for sc,qc,want in ((2,1,s),(0,1,q),(1,0,s)):
        im.set_sform(s, sc)
        im.set_qform(q, qc)
        nib.save(im, tmp_path/'x.nii')
        assert np.allclose(read_header(tmp_path/'x.nii')['affine'],
                want) and np.allclose(load_volume(tmp_path/'x.nii').affine, want)

def killed(f):
    "Run `f` in a forked child that ends as if killed, without any clean-up"
    pid = os.fork()
    if not pid:
        try: f()
        finally: os._exit(9)
    os.waitpid(pid, 0)

class Half:
    "A file that ends the process once it has taken some bytes"
    def __init__(self, n): self.n = n
    def __call__(self, obj, f, *args, **kw):
        o = open(f, 'wb') if isinstance(f, (str,Path)) else f
        o.write(b'half'*self.n)
        o.flush()
        os._exit(9)

def test_row_24_weights_are_whole(learner, monkeypatch):
    "A process that is killed while it saves weights leaves the old file, which loads."
    learn = learner(3)
    learn.save('w')
    fn = learn.path/'models'/'w.pth'
    old = fn.read_bytes()
    def f():
        monkeypatch.setattr(torch, 'save', Half(10))
        learn.save('w')
    killed(f)
    assert fn.read_bytes()==old, 'half a file stands where the weights were'
    learn.load('w')

def test_row_24_export_is_whole(learner, monkeypatch):
    "So does one that is killed while it exports; what cannot be exported leaves the old file too."
    learn = learner(3)
    learn.export('m.pkl')
    fn = learn.path/'m.pkl'
    old = fn.read_bytes()
    import threading
    learn.wont_pickle = threading.Lock()
    with pytest.raises(Exception): learn.export('m.pkl')  # noqa: B017
    del learn.wont_pickle
    assert fn.read_bytes()==old, 'half a file stands where the Learner was'
    assert len(learn.dls.train_ds)==6, 'a failed export leaves the Learner as it was'
    def f():
        monkeypatch.setattr(torch, 'save', Half(10))
        learn.export('m.pkl')
    killed(f)
    assert fn.read_bytes()==old and load_learner(fn).dls.codes==CODES

def test_row_24_store_and_masks_are_whole(study, cache, tmp_path, monkeypatch):
    "A store and a mask that were being written are made again, or stay the old ones; never half."
    path,df = study
    st,fn = Store(Preprocess(spacing=1.5), cache),str(path/df.image[0])
    def f():
        real = np.save
        def half(file, a):
            real(file, a.ravel()[:100])
            os._exit(9)
        monkeypatch.setattr(np, 'save', half)
        st.add_image(fn)
    killed(f)
    assert not st.entry('image', fn).exists()
    assert torch.equal(Store(Preprocess(spacing=1.5), cache).build([fn]).image(fn), st.preprocess(load_volume(fn)))
    m = TensorVolumeMask(torch.ones(4,5,6, dtype=torch.uint8), affine=np.eye(4))
    out = m.save(tmp_path/'m.nii.gz')
    old = out.read_bytes()
    def g():
        monkeypatch.setattr(nib, 'save', lambda im,f: (Path(f).write_bytes(b'half'), os._exit(9)))
        (m*0).as_subclass(TensorVolumeMask).save(out)
    killed(g)
    assert out.read_bytes()==old

@pytest.mark.parametrize('ndim', (3,2))
def test_a_network_that_answers_nan_is_named(learner, study, ndim):
    "A training that diverged gives no empty masks: the scan and the reason are named."
    path,df = study
    learn = learner(ndim)
    fn = str(path/df.image[0])
    assert learn.predict_volume(fn).any()
    with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
    with pytest.raises(ValueError, match=re.escape(Path(fn).name)+'.*NaN.*train again'): learn.predict_volume(fn)

# ---- found by trying it from outside

def test_a_subject_in_numbers_and_text_is_one():
    "Two tables put together: 1.0, 1 and '1 ' are the same person, and stay on one side."
    groups = [1.0,'1',2,'2 ',3.0,' 3',4,'4']
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(8)], subject=groups, is_valid=[1]+[0]*7))
    for seed in range(5):
        train,valid = GroupSplitter(groups, .25, seed)(range(8))
        assert len(valid)==2 and {i//2 for i in train}.isdisjoint(i//2 for i in valid)
        fold = group_folds(df, 2, seed)
        assert (fold[::2]==fold[1::2]).all()
    with pytest.raises(InputError, match='both sides'):
        VolumeDataLoaders.from_df(df.assign(image='a'), valid_col='is_valid', mask_col=None)

@pytest.mark.parametrize('folds,case', [([0,.5,1,1],'c1'), ([0,np.nan,1,1],'c1'), (list('0a11'),'c1')], ids=str)
def test_folds_are_whole_numbers(folds, case, tmp_path):
    df = pd.DataFrame(dict(case=['c0','c1','c2','c3'], image='a', mask='b', fold=folds))
    for make in (lambda: Comparison(df, folds='fold', path=tmp_path/'a'),
                 lambda: cross_validate(df, folds='fold', path=tmp_path/'b')):
        with pytest.raises(InputError, match=f"case '{case}': fold is"): make()

def test_weights_and_parts_of_an_epoch_go_together(exact):
    "The weights were forgotten by `partial_dataloaders`, and the part by `weighted_dataloaders`."
    dls = exact(3, bs=1, samples_per_case=3).dls
    wgts = [1]+[0]*(len(dls.train_ds)-1)
    for o in (dls.weighted_dataloaders(wgts).partial_dataloaders(4),
              dls.partial_dataloaders(4).weighted_dataloaders(wgts)):
        assert len(o.train)==4 and {i%len(dls.train_ds) for i in o.train.get_idxs()}=={0}

def test_codes_in_another_order_are_refused(exact, study, cache):
    "The metrics took the new names, and the channels of the network did not."
    learn = exact(3)
    turned = exact(3, codes={'background':0,'small':2,'large':1}).dls
    with pytest.raises(InputError, match='in this order'): learn.dls = turned

def test_a_class_without_a_code_is_refused(exact):
    "The mask held numbers that no code names."
    dls = exact(3).dls
    for n in (2,5):
        with pytest.raises(InputError, match=f'n_out={n}'): unet3d_learner(dls, nf=4, depth=2, n_out=n)
    assert unet3d_learner(dls, nf=4, depth=2, n_out=5, loss_func=DiceCELoss()).n_out==5

def test_what_is_scored_in_training_is_what_is_shown(exact):
    "`Interpretation(ds_idx=0)` scored one patch and showed another."
    learn = exact(3, samples_per_case=2, batch_tfms='auto')
    a,b = learn.get_preds(ds_idx=0),learn.get_preds(ds_idx=0)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    interp = Interpretation.from_learner(learn, ds_idx=0)
    losses,idxs = interp.top_losses(3)
    shown = interp[idxs]
    assert torch.allclose(torch.as_tensor(shown[-1]).float(), losses.float())
    x = learn.dls.train.one_batch()[0]
    assert not torch.equal(x, learn.dls.train.one_batch()[0]), 'training goes on drawing anew'

@pytest.mark.parametrize('tolerance', (-1, float('nan')))
def test_a_tolerance_below_zero_is_refused(tolerance, exact):
    "It gave a surface Dice of 0 everywhere."
    with pytest.raises(InputError, match='tolerance'): exact(3).evaluate(tolerance=tolerance)

def test_sizes_that_are_no_number_are_refused():
    for o in (float('nan'), float('inf')):
        with pytest.raises(InputError, match='spacing'): Preprocess(spacing=(1,1,o))
