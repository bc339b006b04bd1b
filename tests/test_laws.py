"The ten laws of the library. Each test fails when the law is broken."
import inspect
import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from phantoms import *

from fastmed.all import *
from fastmed.core import ArgumentError
from fastmed.data.recipe import get_plan
from fastmed.predict.windows import fill_holes, keep_largest, slide_window

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)

def preds_of(learn, files, **kw):
    with learn.no_bar(): return learn.get_preds(dl=learn.dls.test_dl(files, **kw))[0]

@pytest.fixture(scope='module')
def exact(study, tmp_path_factory):
    """`exact(ndim)` gives a Learner whose network is right without training, on the voxels of the scan itself; more
    arguments go to `from_df`."""
    path,df = study
    cache = tmp_path_factory.mktemp('exact')
    def make(ndim=3, arch=Nearest, **kwargs):
        kw = dict(path=path, codes=CODES, valid_pct=.25, spacing=None, patch=16, normalize='none', batch_tfms=None,
                  bs=2, samples_per_case=1, cache=cache, **QUIET)
        if ndim==2: kw['axis'] = 2
        dls = (VolumeDataLoaders if ndim==3 else SliceDataLoaders).from_df(df, **{**kw, **kwargs})
        return (unet3d_learner if ndim==3 else unet2d_learner)(dls, arch)
    return make

def same_place(m, fn):
    "The mask has the scan's own shape, affine and orientation."
    im = nib.load(fn)
    assert tuple(m.shape)==im.shape[:3]
    assert np.array_equal(m.affine, im.affine) and m.orientation==''.join(nib.aff2axcodes(im.affine))

# ---- 1

def equal(fresh, *keys):
    here,there = fresh
    for k in keys:
        assert here[k].shape==there[k].shape and here[k].tobytes()==there[
                k].tobytes(), f'{k} differs in a fresh process'

@pytest.mark.parametrize('ndim', (3,2))
def test_law_1_fresh_process_predicts_the_same_bits(fresh, ndim):
    """An exported Learner, loaded in another process after a pipeline with other settings was built there, gives the
    same answers to the last bit."""
    equal(fresh, *[f'{k}_{ndim}' for k in ('volume','affine','tta','proba','decoded','ids','probs','preds','pre')])
    assert len(np.unique(fresh[0][f'volume_{ndim}']))>1, 'the prediction is empty, so this test shows nothing'

def test_law_1_other_pipelines_do_not_reach_in(learner, study, tmp_path):
    "Nor does it change here, when another pipeline is made, trained and asked."
    path,df = study
    learn,files = learner(3),[str(path/o) for o in df.image[:3]]
    before = learn.predict_volume(files[2]),preds_of(learn, files),repr(learn.dls.preprocess),dict(learn.dls.plan)
    dls = VolumeDataLoaders.from_df(df, path, spacing=3., patch=8, normalize='minmax', codes=['nothing','a','b'],
            cache=tmp_path, **QUIET)
    other = unet3d_learner(dls, nf=2, depth=2)
    with other.no_bar(), other.no_logging(): other.fit(1)
    other.predict_volume(files[2])
    after = learn.predict_volume(files[2]),preds_of(learn, files),repr(learn.dls.preprocess),dict(learn.dls.plan)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2:]==after[2:]

def test_law_1_batches_of_the_same_files_are_asked_alike(learner, study):
    "What else is in a batch, or in which order, does not change the answer for a file."
    path,df = study
    learn,files = learner(3),[str(path/o) for o in df.image[:4]]
    a = preds_of(learn, files, bs=1)
    assert torch.equal(a, preds_of(learn, files, bs=1)), 'the patch of a file must not change between two looks'
    assert torch.equal(a.flip(0), preds_of(learn, files[::-1], bs=1))

# ---- 2

PLACES = [('RAS',(1,1,1),(20,20,20)), ('LAS',(1,1,1),(12,13,12)), ('PSR',(.7,.7,3.),(40,44,12)),
        ('SLA',(1.3,1,1),(16,50,16)), ('IPL',(2,1,.5),(12,21,37)), ('ARI',(1,1.5,1),(33,12,15))]

@pytest.mark.parametrize('ndim', (3,2))
@pytest.mark.parametrize('code,spacing,shape', PLACES, ids=[o[0] for o in PLACES])
def test_law_2_own_shape_affine_orientation(exact, tmp_path, ndim, code, spacing, shape):
    "Whatever the order of the axes, smaller than the patch or larger, every voxel is answered, at its own place."
    c = write_case(tmp_path, 'new', affine_of(code, spacing, (-30,12.5,7)), shape, seed=3)
    learn = exact(ndim)
    m = learn.predict_volume(tmp_path/c['image'])
    same_place(m, tmp_path/c['image'])
    assert np.array_equal(m.numpy(), load_mask(tmp_path/c['mask']).numpy()), 'the network is exact, so the mask must be'
    m.save(tmp_path/'out.nii.gz')
    back = nib.load(tmp_path/'out.nii.gz')
    assert back.shape==shape and np.allclose(back.affine, nib.load(tmp_path/c['image']).affine, atol=1e-5)
    assert np.array_equal(np.asarray(back.dataobj), np.asarray(nib.load(tmp_path/c['mask']).dataobj))

@pytest.mark.parametrize('ndim', (3,2))
def test_law_2_oblique(exact, tmp_path, ndim):
    "A grid that is turned in space keeps its affine to the last digit."
    c,s = np.cos(.3),np.sin(.3)
    aff = affine_of('LPS', (1,1,2), (4,5,6))
    aff[:3,:3] = np.array([[c,-s,0],[s,c,0],[0,0,1]])@aff[:3,:3]
    r = write_case(tmp_path, 'new', aff, (22,20,14))
    m = exact(ndim).predict_volume(tmp_path/r['image'])
    same_place(m, tmp_path/r['image'])
    assert np.array_equal(m.numpy(), load_mask(tmp_path/r['mask']).numpy())

@pytest.mark.parametrize('ndim', (3,2))
def test_law_2_nothing_is_cropped(exact, tmp_path, ndim):
    "A scan with no background at all, up to its last corner, is structure all over; with a coarser pipeline too."
    full = lambda a: np.ones_like(a)
    c = write_case(tmp_path, 'full', affine_of('LSP', (1,1,1.5)), (37,18,23), image=full, mask=full)
    for spacing in (None, 1.7):
        learn = exact(ndim, spacing=spacing)
        for overlap in (0,.5):
            m = learn.predict_volume(tmp_path/c['image'], overlap=overlap)
            same_place(m, tmp_path/c['image'])
            assert (m.numpy()==1).all(), f'{int((m!=1).sum())} of {m.numel()} voxels are not covered'

def test_law_2_resampling_pipeline_comes_back(exact, tmp_path):
    """Through a pipeline of another spacing the mask is back in place: Dice near 1, centres of mass within a third of a
    voxel."""
    from scipy.ndimage import center_of_mass
    c = write_case(tmp_path, 'new', affine_of('PIR', (.9,1.1,1.6), (9,8,7)), (44,40,28))
    m = exact(3, spacing=1.25).predict_volume(tmp_path/c['image'])
    same_place(m, tmp_path/c['image'])
    t = load_mask(tmp_path/c['mask']).numpy()
    for k in (1,2):
        assert dice_score(m.numpy()==k, t==k) > .93
        assert np.abs(np.array(center_of_mass(m.numpy()==k))-center_of_mass(t==k)).max() < .34

def test_law_2_probabilities_and_folder(exact, tmp_path):
    "Probabilities lie on the scan's own grid too, and so do the masks of a whole folder."
    for i,(code,sp,shape) in enumerate(PLACES[:3]): write_case(tmp_path, f'n{i}', affine_of(code, sp, (i,i,i)), shape)
    learn = exact(3)
    m,p = learn.predict_volume(tmp_path/'images'/'n2.nii', proba=True)
    assert tuple(p.shape[1:])==tuple(m.shape) and np.array_equal(p.affine, m.affine) and torch.equal(p.argmax(0),
            m.long())
    df = learn.predict_folder(tmp_path/'images', tmp_path/'out', images='*.nii')
    assert df.status.eq('ok').all()
    for i in range(3):
        a,b = nib.load(tmp_path/'out'/f'n{i}.nii.gz'),nib.load(tmp_path/'images'/f'n{i}.nii')
        assert a.shape==b.shape and np.allclose(a.affine, b.affine, atol=1e-5)
        assert np.array_equal(np.asarray(a.dataobj), np.asarray(nib.load(tmp_path/'labels'/f'n{i}.nii').dataobj))

def test_law_2_real_scans(data, exact):
    "Scans as the scanner gave them: other orders, slices of 7.5 and 17 mm."
    for fn in sorted((data/'spine').glob('*.nii.gz'))[:2]:
        for nd in (3,2): same_place(exact(nd, patch=64 if nd==3 else 128).predict_volume(fn, overlap=0), fn)

# ---- 3

def refused(f, *args, **kw):
    "`f` refuses an argument that nobody takes, by its name."
    with pytest.raises((TypeError,ValueError), match='nonsense_arg'): f(*args, nonsense_arg=1, **kw)

def test_law_3_unknown_is_refused(study, learner, loaders, tmp_path):
    "Every public function refuses an unknown argument, and says which."
    path,df = study
    learn,fn = learner(3),path/'images'/'c0.nii'
    for c in (VolumeDataLoaders, SliceDataLoaders):
        refused(c.from_df, df, path)
        refused(c.from_folder, path, 'images/*.nii', 'labels/*.nii')
    (tmp_path/'dataset.json').write_text(
            json.dumps(dict(training=[dict(image=str(path/r.image), label=str(path/r.mask)) for r in df.itertuples()],
            labels={'0':'b','1':'l','2':'s'})))
    refused(VolumeDataLoaders.from_decathlon, tmp_path)
    refused(unet3d_learner, loaders[3])
    refused(unet2d_learner, loaders[2])
    refused(unet3d_learner, loaders[3], 'BasicUNet')
    for f in (learn.predict_volume, learn.predict): refused(f, fn)
    refused(learn.predict_folder, path/'images', tmp_path/'o', images='*.nii')
    refused(learn.evaluate)
    refused(learn.fit_for, 1)
    refused(learn.fine_tune, 1)
    refused(learn.tta)
    refused(learn.get_preds)
    for f in (Preprocess, volume_tfms, UNet, DiceCallback, DiceLoss, DiceCELoss, TverskyLoss, FocalLoss, PatchTransform,
              VolumeBlock, VolumeMaskBlock, SliceBlock, SliceMaskBlock, BudgetCallback, GroupSplitter, suggest_plan,
              load_volume, load_mask,
              save_volume, scan_folder, scan_decathlon, dice_metrics, case_scores, keep_largest, fill_holes,
              slide_window, cohort, Store, PictureCallback):
        with pytest.raises(TypeError, match='nonsense_arg'): f(nonsense_arg=1)
    with pytest.raises(ValueError, match='nonsense_arg'):
        Preprocess.from_json(json.dumps({**Preprocess().to_dict(), 'nonsense_arg':1}))

def test_law_3_from_df_uses_each_argument(study, tmp_path):    # a table
    "Each argument of `from_df` changes what it is there to change."
    path,df = study
    df = df.assign(site=[f'x{i%3}' for i in range(8)], held=[i<2 for i in range(8)], finds=['a|b','a']*4,
            image_b=df.image, mask_b=df['mask'].str.replace('labels','labels_b'))
    (path/'labels_b').mkdir(exist_ok=True)
    for a,b in zip(df['mask'], df.mask_b):
        m = nib.load(path/a)
        nib.save(nib.Nifti1Image((np.asarray(m.dataobj)>0).astype(np.uint8), m.affine), path/b)
    class Zero(ItemTransform):
        def encodes(self, o): return (o[0]*0, *o[1:])
    class Seven(Transform):
        split_idx = None
        def encodes(self, o:TensorVolume): return o*0+7
    kw = dict(path=path, codes=CODES, spacing=None, patch=12, normalize='zscore', bs=2, samples_per_case=1,
              batch_tfms=None, cache=tmp_path/'cache', **QUIET)
    make = lambda cls=VolumeDataLoaders, **k: cls.from_df(df, **{**kw, **k})
    base = make()
    label = lambda **k: VolumeDataLoaders.from_df(df, **{**{a:v for a,v in kw.items() if a not in ('patch','codes')},
                                                         'label_col':'site', **k})
    xb = lambda d: d.train.one_batch()[0]
    valid = lambda d: set(d.valid_ds.items.case)
    fg = lambda d,n=4: np.mean([bool(b[1].any()) for _ in range(n) for b in d.train])
    used = dict(
        df=lambda: len(VolumeDataLoaders.from_df(df[:4], **kw).train_ds.items)<len(base.train_ds.items),
        path=lambda: pytest.raises(FileNotFoundError, make, path=tmp_path),
        image_col=lambda: xb(make(image_col=['image','image_b'])).shape[1]==2 and xb(base).shape[1]==1,
        mask_col=lambda: make(mask_col='mask_b', codes=None).c==2 and base.c==3,
        codes=lambda: make(codes=['u','v','w']).codes==['u','v','w'],
        group_col=lambda: not set(make(group_col='site').valid_ds.items.site)
            & set(make(group_col='site').train_ds.items.site),
        valid_col=lambda: valid(make(valid_col='held'))=={'c0','c1'}!=valid(base),
        valid_pct=lambda: len(valid(make(valid_pct=.5)))==4 and len(valid(base))==2,
        seed=lambda: len({tuple(sorted(valid(make(seed=s)))) for s in range(6)})>1,
        spacing=lambda: make(spacing=2.).preprocess.spacing==(2.,2.,2.),
        patch=lambda: xb(make(patch=(8,12,16))).shape[2:]==(8,12,16),
        normalize=lambda: make(normalize='minmax').preprocess.normalize=='minmax'
            and xb(make(normalize='minmax')).min()>=0,
        bs=lambda: len(xb(make(bs=3)))==3,
        samples_per_case=lambda: make(samples_per_case=5).train.n==5*base.train.n,
        foreground=lambda: fg(make(foreground=1., patch=4, bs=1, samples_per_case=4))>.9 > .5
        > fg(make(foreground=0., patch=4, bs=1, samples_per_case=4)),
        item_tfms=lambda: not xb(make(item_tfms=Zero())).any(),
        batch_tfms=lambda: (xb(make(batch_tfms=[Seven()]))==7).all()
            and len(make(batch_tfms='auto').train.after_batch.fs)>len(base.train.after_batch.fs),
        cache=lambda: make(cache=tmp_path/'elsewhere') and len(list((tmp_path/'elsewhere').rglob('data.npy')))==16,
        num_workers=lambda: make(num_workers=2).train.fake_l.num_workers==2 and base.train.fake_l.num_workers==0,
        device=lambda: make(device='meta').device.type=='meta' and base.device.type=='cpu',
        axis=lambda: {make(SliceDataLoaders, patch=(8,10), axis=a).plan.patch for a in (0,1,2)}=={(1,8,10),(8,1,10),
            (8,10,1)},
        context=lambda: xb(make(SliceDataLoaders, axis=0, context=2)).shape[1]==5,
        minutes=lambda: make(minutes=5).plan.minutes==5 and 'minutes' not in base.plan,
        plan=lambda: make(plan=base.plan, patch='auto', bs=None, samples_per_case='auto',
                          spacing='auto').plan==base.plan,
        label_col=lambda: (label().task, label(label_col='held').vocab, base.task)==('category', [False,True], 'mask'),
        y_block=lambda: label(label_col='held', y_block='regression').task=='regression',
        label_delim=lambda: label(label_col='finds', label_delim='|').vocab==['a','b']
            and label(label_col='finds').vocab==['a','a|b'],
        size=lambda: xb(label(size=16)).shape[2:]==(16,16,16)!=xb(label()).shape[2:],
        stratify=lambda: any(valid(label(label_col='finds', group_col='case', valid_pct=.25, seed=s))
            !=valid(label(label_col='finds', group_col='case', valid_pct=.25, seed=s, stratify=False))
                          for s in range(4)))
    assert set(used)==set(inspect.signature(VolumeDataLoaders.from_df).parameters), 'an argument without its check'
    for k,f in used.items(): assert f(), f'from_df accepts {k} and does nothing with it'
    for k in ('axis','context'):
        with pytest.raises(ValueError, match=k): make(**{k:1})

def test_law_3_learner_uses_each_argument(loaders, tmp_path, weights):
    "So do the arguments of `unet3d_learner`: those of its own, of the network and of `Learner`."
    make = lambda **k: unet3d_learner(loaders[3], **{**dict(nf=4, depth=2), **k})
    torch.save(weights[3], tmp_path/'w.pth')
    class Mine(Callback): pass
    used = dict(arch=lambda: isinstance(unet3d_learner(loaders[3], Nearest).model, Nearest),
                loss_func=lambda: isinstance(make(loss_func=FocalLoss()).loss_func, FocalLoss),
        metrics=lambda: [m.name for m in make(metrics=DiceScore(1,'one')).metrics]==['one'],
            pretrained=lambda: all(torch.equal(v, weights[3][k]) for k,
            v in make(pretrained=tmp_path/'w.pth').model.state_dict().items()),
        fast=lambda: len(make(fast=False).model._forward_pre_hooks)==0 < len(make().model._forward_pre_hooks),
        nf=lambda: make(nf=8).model.nfs[0]==8, depth=lambda: len(make(depth=3).model.nfs)==3,
        norm=lambda: any(isinstance(m, nn.BatchNorm3d) for m in make(norm='batch').model.modules()),
            lr=lambda: make(lr=.5).lr==.5, wd=lambda: make(wd=.5).wd==.5, cbs=lambda: hasattr(make(cbs=Mine()), 'mine'),
        opt_func=lambda: make(opt_func=SGD).opt_func is SGD, path=lambda: make(path=tmp_path).path==tmp_path,
        model_dir=lambda: make(model_dir='elsewhere').model_dir=='elsewhere',
        moms=lambda: make(moms=(.5,.4,.5)).moms==(.5,.4,.5),
        train_bn=lambda: make(train_bn=False).train_bn is False,
            wd_bn_bias=lambda: make(wd_bn_bias=True).wd_bn_bias is True,
            default_cbs=lambda: not hasattr(make(default_cbs=False), 'recorder'))
    for k,f in used.items(): assert f(), f'unet3d_learner accepts {k} and does nothing with it'
    dls = VolumeDataLoaders(*loaders[3].loaders, path=loaders[3].path, device='cpu')
    with pytest.raises(ValueError, match='n_out=1'): unet3d_learner(dls, n_out=1)
    assert unet3d_learner(dls, nf=4, depth=2, n_out=5, loss_func=FocalLoss()).model.n_out==5
    known = set(inspect.signature(Learner.__init__).parameters)-{'self','dls','model','loss_func','metrics','splitter'}
    assert known<=set(used), f'no check for {known-set(used)}'

def test_law_3_prediction_uses_each_argument(exact, study, tmp_path):
    "And those of prediction and evaluation."
    path,df = study
    learn,fn = exact(3, arch=Edge),path/'images'/'c0.nii'
    def calls(f, **k):
        learn.model.calls = 0
        f(**k)
        return learn.model.calls
    pv,ev = partial(learn.predict_volume, fn),learn.evaluate
    for f in (pv, ev): assert calls(f) < calls(f, overlap=.8) and calls(f) < calls(f, tta=True)
    assert isinstance(pv(proba=True), tuple)
    zero = lambda m: m*0
    assert pv().any() and not pv(post=zero).any()
    assert ev().dice.min()>ev(post=zero).dice.max()==0 and len(ev(df[:1]))==2
    assert ev(tolerance=0.).nsd.mean() < ev(tolerance=5.).nsd.mean()==1
    a,b = [set(inspect.signature(o).parameters) for o in (learn.predict_volume, learn.evaluate)]
    flat = exact(2, arch=Edge)
    assert not np.array_equal(flat.predict_volume(fn, axes=(0,)),
                              flat.predict_volume(fn, axes=(1,))), 'slices across another axis are other slices'
    with pytest.raises(ArgumentError, match='regrid'): pv(regrid=True)      # of DICOM series, see test_dicomseg
    assert a=={'fn','overlap','tta','proba','post','axes','regrid'} and b=={'df','tolerance',
            'kwargs'}, 'an argument without its check'
    out = learn.predict_folder(path/'images', tmp_path/'o', images='c0.nii', post=zero)
    assert len(out)==1 and not load_mask(out['mask'][0]).any()
    assert len(learn.predict(fn, with_input=True))==4

def test_law_3_predict_uses_or_refuses_rm_type_tfms(learner, study):
    "`predict` takes whole files, so fastai's `rm_type_tfms` has no meaning there: it is refused by name, not dropped."
    with pytest.raises((TypeError,ValueError), match='rm_type_tfms'):
        learner(3).predict(study[0]/study[1].image[0], rm_type_tfms=1)

def test_law_3_callbacks_use_each_argument(exact, study):
    "And those of `DiceCallback` and of `fit_for`."
    learn = exact(3)
    def looks(**k):
        learn.model.calls = 0
        with learn.no_bar(), learn.no_logging(): learn.fit(3, lr=0., cbs=DiceCallback(**k))
        return learn.model.calls
    base = looks()
    assert looks(every=2)<base and looks(n=1)<base<looks(overlap=.8)
    one = DiceCallback(n=1, every=2)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, lr=0., cbs=one)
    assert one.cases.epoch.unique().tolist()==[1,2] and one.cases.case.nunique()==1, 'every second epoch, and the last'
    assert set(inspect.signature(DiceCallback).parameters)=={'every','n','overlap'}, 'an argument without its check'
    with learn.no_bar(), learn.no_logging(): learn.fit_for(.005, lr_max=.25)
    assert .01<max(learn.recorder.lrs)<=.25

def test_law_3_volume_tfms_uses_each_argument():
    "Each strength and probability reaches the transform that it is for."
    def state(**k): return [[(a,str(v)) for a,v in sorted(vars(t).items())] for t in volume_tfms(**k)]
    base = state(max_elastic=.1, max_bias=.1, flips=(0,))
    for k in inspect.signature(volume_tfms).parameters:
        v = dict(spacing=(1,1,3.), flips=(1,), xtra_tfms=[Transform()]).get(k, .22)
        if k=='max_low_res': v = 1.5
        assert state(**{**dict(max_elastic=.1, max_bias=.1, flips=(0,)),
                        k:v})!=base, f'volume_tfms accepts {k} and does nothing with it'

# ---- 4

OFF_GRID = dict(shifted=dict(mask_affine=affine_of(origin=(0,0,3))),
        finer=dict(mask_affine=affine_of(spacing=(1,1,.5))), mirrored=dict(mask_affine=affine_of('LAS')),
        cropped=dict(mask=lambda m: m[:-1]))

@pytest.mark.parametrize('how', OFF_GRID)
def test_law_4_unlike_grids_name_both_files(study, exact, tmp_path, how):
    "Image and mask on two grids are refused with both names: by `from_df`, by a plain DataBlock and by `evaluate`."
    good = [write_case(tmp_path, f'g{i}') for i in range(3)]
    bad = write_case(tmp_path, 'bad', **OFF_GRID[how])
    df = pd.DataFrame(good+[bad])
    def check(e):
        s = str(e.value)
        assert 'images/bad.nii' in s and 'labels/bad.nii' in s and 'resample' in s, s
    with pytest.raises(ValueError) as e: VolumeDataLoaders.from_df(df, tmp_path, cache=tmp_path/'c', **QUIET)
    check(e)
    block = DataBlock((VolumeBlock, VolumeMaskBlock(CODES)), get_x=CaseFiles('image', tmp_path),
            get_y=CaseFiles('mask', tmp_path), splitter=IndexSplitter([0]), item_tfms=PatchTransform((8,8,8)))
    with pytest.raises(ValueError) as e:
        for _b in block.dataloaders(df, bs=1, **QUIET).train: pass
    check(e)
    with pytest.raises(ValueError) as e:
        exact(3).evaluate(df[3:].assign(image=str(tmp_path/bad['image']), mask=str(tmp_path/bad['mask'])))
    check(e)

def test_law_4_resample_when_asked(tmp_path):
    "A mask that shows the same anatomy on a finer grid is taken, once the person has resampled it."
    (im,_),(_,m) = phantom((20,20,20), affine_of()), phantom((40,40,40), affine_of(spacing=(.5,)*3, origin=(-.25,)*3))
    rows = []
    for i in range(3):
        nib.save(im, tmp_path/f'i{i}.nii')
        nib.save(m, tmp_path/f'm{i}.nii')
        rows.append(dict(case=f'x{i}', image=f'i{i}.nii', mask=f'm{i}.nii'))
    df = pd.DataFrame(rows)
    with pytest.raises(ValueError, match='resample_to'):
        VolumeDataLoaders.from_df(df, tmp_path, cache=tmp_path/'c', **QUIET)
    v = load_volume(tmp_path/'i0.nii')
    for i in range(3): resample_to(load_mask(tmp_path/f'm{i}.nii'), v.shape[1:], v.affine).save(tmp_path/f'm{i}.nii')
    dls = VolumeDataLoaders.from_df(df, tmp_path, patch=8, normalize='none', cache=tmp_path/'c', **QUIET)
    x,y = dls.train_ds[0]
    assert dice_score(y==1, x[0].round()==1)>.9 and dice_score(y==2, x[0].round()==2)>.8

# ---- 5

@pytest.mark.parametrize('cls', (VolumeDataLoaders, SliceDataLoaders))
def test_law_5_subject_on_one_side(study, tmp_path, cls):
    "By default the subject column groups, and `group_col` groups by another."
    path,df = study
    kw = dict(path=path, codes=CODES, spacing=None, patch=8, normalize='none', bs=1, samples_per_case=1, cache=tmp_path,
              **QUIET)
    for seed in range(8):
        dls = cls.from_df(df.sample(frac=1, random_state=seed), seed=seed, valid_pct=.3, **kw)
        a,b = set(dls.train_ds.items.subject),set(dls.valid_ds.items.subject)
        assert a and b and not a&b, f'seed {seed}: {a&b} on both sides'
    dls = cls.from_folder(path, 'images/*.nii', 'labels/*.nii', **{k:v for k,v in kw.items() if k!='path'})
    assert 'subject' in dls.train_ds.items and not set(dls.train_ds.items.subject)&set(
            dls.valid_ds.items.subject), 'cases.csv names the subjects'
    dls = cls.from_df(df.assign(ward=list('abababab')), group_col='ward', **kw)
    assert not set(dls.train_ds.items.ward)&set(dls.valid_ds.items.ward)

def test_law_5_a_split_that_parts_a_subject_is_refused(study, tmp_path):
    """A validation column that puts one subject on both sides is an error that names it; a row without a subject is one
    too."""
    path,df = study
    with pytest.raises(ValueError, match="s1.*both sides"):
        VolumeDataLoaders.from_df(df.assign(v=[i==3 for i in range(8)]), path, valid_col='v', cache=tmp_path, **QUIET)
    with pytest.raises(ValueError, match='no group'):
        VolumeDataLoaders.from_df(df.assign(subject=[None,*df.subject[1:]]), path, cache=tmp_path, **QUIET)

def test_law_5_splitter_property():
    "Any groups, any seed, any share: no group is parted, nothing is lost, both sides hold something."
    rng = np.random.default_rng(0)
    for seed in range(200):
        g = rng.integers(0, rng.integers(2,12), size=rng.integers(4,40)).tolist()
        if len(set(g))<2: continue
        tr,va = GroupSplitter(g, float(rng.uniform(.05,.9)), seed)(range(len(g)))
        assert len(tr) and len(va) and sorted([*tr,*va])==list(range(len(g))) and not {g[i] for i in tr}&{g[i]
                for i in va}

# ---- 6

@pytest.fixture
def hard(exact, tmp_path):
    "Five cases for a network that is exact: right, missed, false positive, empty, unreadable: (Learner, DataFrame)."
    no2,only1 = lambda m: np.where(m==2, 0, m),lambda a: np.where(a>1.5, 0, a)
    rows = [write_case(tmp_path, 'good'), write_case(tmp_path, 'missed', image=only1),
            write_case(tmp_path, 'wrong', mask=no2), write_case(tmp_path, 'none', image=only1, mask=no2),
            write_case(tmp_path, 'broken')]
    (tmp_path/rows[4]['image']).write_bytes(b'no scan')
    df = pd.DataFrame(rows)
    return exact(3),df.assign(image=[str(tmp_path/o) for o in df.image], mask=[str(tmp_path/o) for o in df['mask']])

def test_law_6_empty_structures_and_failures(hard):
    "Both empty is nan and counted apart; one empty is 0 and failed; a scan that cannot be read is failed, not dropped."
    learn,df = hard
    ev = learn.evaluate(df)
    r = pd.DataFrame(ev).query("structure=='small'").set_index('case')
    assert r.status.iloc[:4].tolist()==['ok','missed','false positive',
            'empty'] and r.status['broken'].startswith('error') and 'broken.nii' in r.status['broken']
    assert r.dice.iloc[:3].tolist()==[1,0,
            0] and np.isnan(r.dice['none']) and r.hd95.iloc[1:3].tolist()==[np.inf]*2 and r.nsd.iloc[1:3].tolist()==[0,
                                   0]
    assert len(ev)==10, 'each case has a row for each structure'
    s = ev.summary()
    assert s.loc['small',['n','failed','empty']].tolist()==[5,3,1] and s.loc['all','n']==5
    assert s.loc['small','mean']==pytest.approx(1/4), 'failures count as 0 in the mean, the empty one does not count'
    assert ev.summary('hd95').loc['small','failed']==3
    nothing = ev[ev.case=='none'].assign(dice=np.nan, status='empty')
    assert nothing.summary().loc['all',['n','failed','empty']].tolist()==[1,0,
                                        1], 'a case with no structure at all is counted apart too'

def test_law_6_a_callback_counts_alike(hard):
    "The column of the training table follows the same rule."
    learn,df = hard
    df = df[:4]
    dls = VolumeDataLoaders.from_df(df.assign(v=[False,True,True,True]), codes=CODES, spacing=None, patch=16,
                                    normalize='none', batch_tfms=None, bs=1, samples_per_case=1, valid_col='v',
                                    cache=Path(df.image[0]).parent/'cache', **QUIET)
    learn = unet3d_learner(dls, Nearest, cbs=DiceCallback(), lr=0., wd=0.)
    with learn.no_bar(): learn.fit(1)
    c = learn.dice.cases.query("structure=='small'").set_index('case')
    assert c.status.to_dict()==dict(missed='missed', wrong='false positive',
            none='empty') and c.dice[['missed','wrong']].tolist()==[0,0]
    assert learn.recorder.log[learn.recorder.metric_names.index('case_dice_small')]==0
    assert learn.recorder.log[learn.recorder.metric_names.index('case_dice_large')]==1

def test_law_6_patch_metrics():
    "Over patches: a structure that never occurs is nan, one that is only predicted is 0."
    p = torch.zeros(1,3,4,4,4)
    p[:,0] = 1
    t = torch.zeros(1,4,4,4, dtype=torch.uint8)
    class Fake: pass
    def score(pred, targ):
        res = []
        for m in dice_metrics(CODES):
            m.reset()
            l = Fake()
            l.pred,l.yb = pred,(targ,)
            m.accumulate(l)
            res.append(m.value)
        return res
    assert np.isnan(score(p, t)).all()
    p[:,1,0,0,0] = 5
    large,small,mean = score(p, t)
    assert large==0 and np.isnan(small) and mean==0

# ---- 7

@pytest.mark.parametrize('ndim', (3,2))
def test_law_7_a_batch_has_no_place(loaders, ndim):
    "What a batch stacks has several places, so it claims none: no affine, no spacing, no file."
    for dl in (loaders[ndim].train, loaders[ndim].valid, loaders[ndim].test_dl(loaders[ndim].valid_ds.items),
               loaders[ndim].train.new(bs=1)):
        for b in list(dl):
            for t in b:
                assert t.affine is None and t.spacing is None and not [k for k in t.__dict__ if k in ('_affine','meta',
                        'draw','fg')], t.__dict__
    x,y = loaders[ndim].train_ds[0]
    assert x.affine is not None and np.array_equal(x.affine, y.affine), 'a case has its place'

def test_law_7_scores_take_the_case_s_own_spacing(exact, tmp_path):
    "The same voxels at two spacings: distances in mm differ as the spacings do, whichever stands first."
    shift = lambda m: np.roll(m, 1, 0)
    rows = [dict(write_case(tmp_path, f's{k}', affine_of(spacing=(k,k,k)), mask=shift)) for k in (1,3)]
    df = pd.DataFrame(rows)
    df['image'],df['mask'] = [[str(tmp_path/o) for o in df[c]] for c in ('image','mask')]
    learn = exact(3)
    for d in (df, df[::-1]):
        e = pd.DataFrame(learn.evaluate(d)).set_index(['case','structure'])
        for s in CODES[1:]:
            assert e.hd95['s3',s]==pytest.approx(3*e.hd95['s1',s]) and e.hd95['s1',s]>=1
            assert e.volume_mm3['s3',s]==pytest.approx(27*e.volume_mm3['s1',s]) and e.dice['s3',
                    s]==pytest.approx(e.dice['s1',s])

def test_law_7_slices_are_drawn_by_the_pipeline(loaders, learner):
    "What is shown takes its proportions from the plan, not from the first item."
    x,y = loaders[2].train.decode_batch(loaders[2].train.one_batch())[0]
    assert x.aspect==1 and y.aspect==1 and x.context==1

# ---- 8

def plain_block(ndim):
    "The four blocks in a plain `DataBlock`"
    f = ((VolumeBlock, VolumeMaskBlock(CODES)),(16,16,16)) if ndim==3 else ((SliceBlock, SliceMaskBlock(CODES)),
            (16,16,1))
    return DataBlock(f[0], get_x=lambda r: r['image'], get_y=lambda r: r['mask'], splitter=IndexSplitter([0,1]),
            item_tfms=PatchTransform(f[1]), batch_tfms=volume_tfms())

def finite(learn, n=1):
    "The last epoch has a loss that is a number"
    assert len(learn.recorder.values)>=n and np.isfinite(learn.recorder.values[-1][:2]).all()

def fits(f):
    def g(l, s):
        before = [p.clone() for p in l.model.parameters()]
        f(l)
        finite(l)
        assert any(not torch.equal(a, b) for a,b in zip(before, l.model.parameters())), 'nothing was learnt'
    return g

def v_lr_find(l, s):
    before = {k:v.clone() for k,v in l.model.state_dict().items()}
    r = l.lr_find(num_it=6, show_plot=True)
    assert r.valley>0 and all(torch.equal(v, before[k]) for k,
                              v in l.model.state_dict().items()), 'lr_find gives the weights back'
def v_lr_find_with_dice(l, s):
    l.add_cb(DiceCallback())
    v_lr_find(l, s)
    l.lr_find(num_it=2*len(l.dls.train)+1, show_plot=False)
    assert not len(l.dice.cases), 'no whole scans are predicted while the rate is sought'
    l.fit(1)
    finite(l)
def v_validate(l, s):
    r = l.validate()
    assert len(r)==1+len(l.metrics) and np.isfinite(r[0]) and r==l.validate()
    assert len(l.validate(dl=l.dls.test_dl(l.dls.valid_ds.items, with_labels=True)))==len(r)
def v_get_preds(l, s):
    n = l.dls.valid.n
    assert n==l.dls.valid.samples*len(l.dls.valid_ds)
    x,p,t,d,loss = l.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert len(x)==len(p)==len(t)==len(d)==len(loss)==n and p.shape[1]==3 and p.shape[2:]==t.shape[1:]==d.shape[
            1:] and loss.shape==(n,)
    assert torch.allclose(p.sum(1), torch.ones(()), atol=1e-5) and torch.equal(p.argmax(1), d)
    # Dice summed over a batch is no mean of items
    if not l.loss_func.batch:
        assert loss.mean()==pytest.approx(l.validate()[0], rel=1e-4)
    assert len(l.get_preds(ds_idx=0)[0])==len(l.dls.train_ds)*l.dls.train.samples
def v_predict(l, s):
    r = l.dls.valid_ds.items.iloc[0]
    fn = s[0]/r.image
    m,ids,p = l.predict(fn)
    same_place(m, fn)
    assert torch.equal(m.as_subclass(Tensor), ids) and tuple(p.shape)==(3,*m.shape)
    for item in (str(fn), r, load_volume(fn)): assert torch.equal(l.predict(item)[0], m)
    x,*_ = l.predict(fn, with_input=True)
    same_place(x[0], fn)
def v_test_dl(l, s):
    files = [s[0]/o for o in s[1].image[:3]]
    for items,lab in ((files,False),(list(map(str, files)),False),(s[1][:3],False),(s[1][:3],True)):
        dl = l.dls.test_dl(items, with_labels=lab)
        b = list(dl)
        assert sum(len(o[0]) for o in b)==3 and len(b[0])==1+lab and len(dl.dataset)==3
        assert len(l.get_preds(dl=dl)[0])==3
    assert l.dls.test_dl([files[0]], bs=1).one_batch()[0].shape==(1,*l.dls.one_batch()[0].shape[1:])
    l.dls.loaders[1] = l.dls.valid.new(samples=3)
    assert len(l.get_preds(dl=l.dls.test_dl(files))[0])==3, 'one patch of each new file, however many validation draws'
def v_show_batch(l, s):
    import matplotlib.pyplot as plt
    l.dls.show_batch(max_n=2)
    assert len([a for a in plt.gcf().axes if a.images])==2
    l.dls.valid.show_batch(max_n=1)
    l.dls.train.show_batch(b=l.dls.one_batch(), max_n=2, unique=False)
    l.dls.show_batch(max_n=2, unique=True)
    l.dls.test_dl(s[1][:2]).show_batch(max_n=2)
def v_show_results(l, s):
    import matplotlib.pyplot as plt
    l.show_results(max_n=2)
    assert len([a for a in plt.gcf().axes if a.images])==2
    l.show_results(ds_idx=0, max_n=1)
    l.show_results(dl=l.dls.test_dl(s[1][:2], with_labels=True), max_n=2)
def v_interpretation(l, s):
    import matplotlib.pyplot as plt
    i = Interpretation.from_learner(l)
    losses,idx = i.top_losses(2)
    assert losses[0]>=losses[1] and len(i.losses)==l.dls.valid.n and len(i.top_losses(1, items=True)[2])==1
    x,_ = l.get_preds(with_input=True)[:2]
    assert torch.equal(i[idx][0], x[idx]), 'the patch with the largest loss is the patch that is shown'
    i.show_results([0,1])
    i.plot_top_losses(2)
    assert len([a for a in plt.gcf().axes if a.images])>=2
def v_interpretation_of_samples(l, s):
    l.dls.loaders[1] = l.dls.valid.new(samples=3)
    i = Interpretation.from_learner(l)
    idx = i.top_losses(6)[1]
    assert len(i.losses)==3*len(l.dls.valid_ds)==6 and torch.equal(i[idx][0],
            l.get_preds(with_input=True)[0][idx]), 'of several patches of a case, the one with the loss is shown'
def v_interpretation_of_training(l, s):
    i = Interpretation.from_learner(l, dl=l.dls.train.new(shuffle=False, drop_last=False, samples=2))
    assert len(i.losses)==2*len(l.dls.train_ds)
    losses,idx = i.top_losses(2)
    i.plot_top_losses(2)
    p,t = l.get_preds(dl=i.dl)
    assert len(p)==len(i.losses)
def v_segmentation_interpretation(l, s): assert SegmentationInterpretation.from_learner(l).top_losses(1)[0]>0
def v_tta(l, s):
    p,t = l.tta()
    q,u = l.get_preds()
    assert p.shape==q.shape and torch.equal(t, u) and not torch.equal(p, q) and torch.allclose(p.sum(1), torch.ones(()),
            atol=1e-5)
def v_export(l, s):
    l.export('x.pkl')
    m = load_learner(l.path/'x.pkl')
    fn = s[0]/s[1].image[2]
    assert torch.equal(m.predict_volume(fn), l.predict_volume(fn)) and m.dls.vocab==CODES
    m = load_learner(l.path/'x.pkl', cpu=True)
    assert m.loss_func.__class__==l.loss_func.__class__
def v_save_load(l, s):
    fn = s[0]/s[1].image[0]
    a = l.predict_volume(fn)
    l.save('w')
    nn.init.normal_(next(l.model.parameters()))
    l.load('w')
    assert torch.equal(a, l.predict_volume(fn))
def there_and_back(l, s, ask):
    "Train in the precision that was chosen, ask, and train in float32 again"
    l.fit(1)
    finite(l)
    ask()
    l.predict_volume(s[0]/s[1].image[0])
    l.to_fp32()
    l.fit(1)
    finite(l)
def v_to_fp16(l, s): there_and_back(l.to_fp16(), s, l.validate)
def v_to_bf16(l, s): there_and_back(l.to_bf16(), s, l.get_preds)
def v_save_model(l, s):
    for m in ('dice_large','dice'):
        l.fit(1, cbs=SaveModelCallback(monitor=m, fname=m))
        assert (l.path/'models'/f'{m}.pth').exists()
    l.fit(1, cbs=[DiceCallback(), SaveModelCallback(monitor='case_dice_large', fname='case')])
    assert (l.path/'models'/'case.pth').exists()
def v_csv_logger(l, s):
    l.fit(2, cbs=[CSVLogger(), DiceCallback()])
    d = pd.read_csv(l.path/'history.csv')
    assert len(d)==2 and {'dice_large','dice_small','dice','case_dice_large','case_dice'}<=set(d)
def v_early_stopping(l, s):
    l.fit(9, lr=0., wd=0., cbs=EarlyStoppingCallback(monitor='dice', patience=1))
    assert len(l.recorder.values)<9
def v_other_callbacks(l, s):
    l.fit(2, cbs=[ReduceLROnPlateau(monitor='dice_large'), GradientAccumulation(2), TerminateOnNaNCallback(),
                                    ShowGraphCallback(), GradientClip(1.), PictureCallback(n=1)])
    finite(l)
    assert len(list((l.path/'pictures').glob('*.png')))==2
def v_freeze(l, s):
    assert len(l.opt.param_lists if l.opt else l.create_opt() or l.opt.param_lists)==2
    l.freeze()
    enc = [p.clone() for p in l.opt.param_lists[0]]
    l.fit(1)
    norms = {id(p) for m in l.model.modules() if 'Norm' in type(m).__name__ for p in m.parameters()}
    assert all(torch.equal(a, b) for a,b in zip(enc, l.opt.param_lists[0])
               if id(b) not in norms), 'the encoder is frozen'
    l.unfreeze()
    l.fit_one_cycle(1, slice(1e-4,1e-3))
    assert any(not torch.equal(a, b) for a,b in zip(enc, l.opt.param_lists[0]))
    assert np.allclose([h['lr'] for h in l.opt.hypers][0]*10, [h['lr'] for h in l.opt.hypers][1])
class Epochs(Callback):
    "Counts them over several fits"
    n = 0
    def after_train(self): self.n += 1
def v_fine_tune(l, s):
    c = Epochs()
    fits(lambda l: l.fine_tune(2, 1e-3, cbs=c))(l, s)
    assert c.n==2, 'no epoch is wasted where nothing is pretrained'
    l.pretrained = True
    l.fine_tune(1, 1e-3, freeze_epochs=1, cbs=c)
    finite(l)
    assert c.n==4
def v_dls(l, s):
    d = l.dls
    for b in (d.one_batch(), d.train.one_batch(), d.valid.one_batch()):
        assert len(b)==2 and b[0].shape[2:]==b[1].shape[1:]
    assert len(d.train.new(bs=1).one_batch()[0])==len(d.new(bs=1).one_batch()[0])==1 and len(d.dataset)==len(
            d.train_ds) and d.vocab==CODES and d.c==3 and d.n_inp==1
    assert d.train_ds.items.case.tolist()+d.valid_ds.items.case.tolist() and set(d.train_ds.items)>={'case','image',
            'mask'}
    x,y = d.train_ds[0]
    assert isinstance(x, TensorVolume) and isinstance(y, TensorVolumeMask)
    assert isinstance(d.one_batch()[0], TensorVolume if get_plan(d).ndim==3 else TensorSlice)
def v_dice_callback(l, s):
    names = [m.name for m in l.metrics]
    l.add_cb(DiceCallback(n=1))
    for _ in range(2):
        l.fit(1, lr=0.)
        assert [m.name
                for m in l.metrics]==names and len(set(l.recorder.metric_names))==len(
                l.recorder.metric_names), 'its columns go with the fit'
def v_summary(l, s): assert 'Total params' in repr(l.summary()) or 'Total params' in str(l.summary())
def v_show_worst(l, s): l.show_worst(1)
def v_fit_for(l, s):
    l.fit_for(.01)
    finite(l)
def v_pickle(l, s):
    import pickle
    m = pickle.loads(pickle.dumps(l.model))
    x = l.dls.one_batch()[0].as_subclass(Tensor)
    assert torch.equal(m.eval()(x), l.model.eval()(x))

VERBS = dict(fit=fits(lambda l: l.fit(1, 1e-3)), fit_one_cycle=fits(lambda l: l.fit_one_cycle(1, 1e-3)),
             fit_flat_cos=fits(lambda l: l.fit_flat_cos(1, 1e-3)), fit_sgdr=fits(lambda l: l.fit_sgdr(1, 1, 1e-3)),
             **{k[2:]:v for k,v in list(globals().items()) if k.startswith('v_')})

@pytest.mark.parametrize('ndim', (3,2))
@pytest.mark.parametrize('verb', VERBS)
def test_law_8_fastai_verb(learner, study, verb, ndim):
    "What fastai gives every Learner works on ours, for volumes and for slices."
    learn = learner(ndim)
    learn.path = Path(learn.path)
    with learn.no_logging(): VERBS[verb](learn, study)

@pytest.mark.parametrize('ndim', (3,2))
def test_law_8_plain_datablock(study, ndim, tmp_path):
    """The blocks in a plain `DataBlock` give plain fastai DataLoaders, and a Learner on them does all that it does on
    ours."""
    path,df = study
    df = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    dls = plain_block(ndim).dataloaders(df, bs=2, path=tmp_path, **QUIET)
    assert type(dls) is DataLoaders and dls.vocab==CODES and dls.c==3 and len(dls.valid_ds)==2
    b = dls.one_batch()
    assert isinstance(b[0], TensorVolume if ndim==3 else TensorSlice) and b[0].shape[2:]==b[1].shape[1:]
    dls.show_batch(max_n=2)
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(dls, nf=4, depth=2, cbs=DiceCallback())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-2)
        finite(learn)
        fn = df.image[2]
        same_place(learn.predict_volume(fn), fn)
        learn.show_results(max_n=2)
        assert len(learn.evaluate())==4 and len(learn.get_preds()[0])==2
        p = learn.predict(df.iloc[2])[0]
        same_place(p, fn)
        learn.dls.test_dl([fn])
    summ = plain_block(ndim).datasets(df)
    assert len(summ.train)==6 and isinstance(summ.train[0][1], TensorVolumeMask)

def test_law_8_plain_datablock_of_files(study, tmp_path):
    """A list of files with a label function, the commonest of fastai's ways: the truth of a whole scan is the mask that
    `get_y` names."""
    path,df = study
    block = DataBlock((VolumeBlock(Preprocess(normalize='none')), VolumeMaskBlock(CODES)),
            get_y=lambda f: Path(str(f).replace('images','labels')), splitter=IndexSplitter([0,1]),
                                                item_tfms=PatchTransform((16,16,16)))
    # an integer image could pass for a mask
    for k,f in (('float',None),('integer',lambda a: (np.round(a)==1).astype(np.uint8))):
        (tmp_path/k/'images').mkdir(parents=True)
        (tmp_path/k/'labels').mkdir()
        for i,m in zip(df.image, df['mask']):
            a,b = nib.load(path/i),nib.load(path/m)
            arr = np.asarray(a.dataobj)
            nib.save(nib.Nifti1Image(f(arr) if f else arr, a.affine), tmp_path/k/i)
            nib.save(b, tmp_path/k/m)
        dls = block.dataloaders([tmp_path/k/o for o in df.image], bs=2, path=tmp_path, **QUIET)
        learn = unet3d_learner(dls, Nearest, cbs=DiceCallback())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, lr=0.)
        d = learn.dice.cases.set_index('structure').dice
        assert (d['small']==(0 if f else 1)).all() and (d['large']>.85).all(), f'{k}: {learn.dice.cases}'
        same_place(learn.predict(tmp_path/k/df.image[2])[0], tmp_path/k/df.image[2])
        assert len(learn.evaluate())==4

@pytest.mark.parametrize('ndim', (3,2))
def test_law_8_plain_datablock_exports(study, ndim, tmp_path):
    "And exports, where the getters can be pickled."
    path,df = study
    block = DataBlock((VolumeBlock, VolumeMaskBlock(CODES)) if ndim==3 else (SliceBlock, SliceMaskBlock(CODES)),
            get_x=CaseFiles('image', path), get_y=CaseFiles('mask', path),
                      splitter=IndexSplitter([0,1]), item_tfms=PatchTransform((16,16,16) if ndim==3 else (16,16,1)))
    learn = (unet3d_learner if ndim==3 else unet2d_learner)(block.dataloaders(df, bs=2, path=tmp_path, **QUIET), nf=4,
                                                            depth=2)
    learn.export('p.pkl')
    fn = path/df.image[2]
    assert torch.equal(load_learner(tmp_path/'p.pkl').predict_volume(fn), learn.predict_volume(fn))

def test_law_8_deep_supervision_and_monai(loaders, study):
    "With deep supervision, and with a network of MONAI, too."
    for kw in (dict(nf=4, depth=3, deep_supervision=True), dict(arch='BasicUNet', features=(2,2,2,2,2,2))):
        learn = unet3d_learner(loaders[3], **kw)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3)
            finite(learn)
            assert len(learn.get_preds(with_loss=True)[2])==loaders[3].valid.n
            learn.show_results(max_n=1)
            same_place(learn.predict_volume(study[0]/study[1].image[0]), study[0]/study[1].image[0])

# ---- 9

def test_law_9_errors_say_which_what_and_how(study, exact, learner, loaders, tmp_path):    # a table
    "Each error names the case or file, what was expected, what was found, and how to fix it."
    path,df = study
    rows = lambda *bad, **k: pd.DataFrame([write_case(tmp_path, f'g{i}') for i in range(3)]+list(bad))
    dls = lambda d, cls=VolumeDataLoaders, **k: cls.from_df(d,
            **{**dict(path=tmp_path, patch=8, cache=tmp_path/'cache', **QUIET), **k})
    def nan(a):
        a = a.copy()
        a[0,0,0] = np.nan
        return a
    case = lambda n, **k: write_case(tmp_path, n, **k)
    cut = case('cut')
    f = tmp_path/cut['image']
    f.write_bytes(f.read_bytes()[:3000])
    text = case('text')
    (tmp_path/text['image']).write_text('this is no scan')
    learn = exact(3)
    two = write_case(tmp_path, 'two', image=lambda a: np.stack([a,a], -1))
    table = dict(
        missing_file=(lambda: dls(rows(dict(case='gone', image='images/gone.nii', mask='labels/g0.nii'))),
            FileNotFoundError, ('gone.nii','no such file','path')),
        no_name=(lambda: dls(rows(dict(case='blank', image=None, mask='labels/g0.nii'))), ValueError,
            ('blank','image','Drop the row')),
        truncated=(lambda: dls(rows(cut)), OSError, ('cut.nii','promises (20, 20, 20) voxels','cannot be read',
                                                     'truncated','again')),
        no_scan=(lambda: dls(rows(text)), OSError, ('text.nii','a readable NIfTI','again')),
        not_finite=(lambda: dls(rows(case('nan', image=nan)), normalize='zscore'), ValueError,
            ('nan.nii','1 voxels','NaN','Repair')),
        odd_labels=(lambda: dls(rows(case('odd', mask=lambda m: m*100)), codes=CODES), ValueError,
            ('odd.nii','100','200','[0, 1, 2]','codes=')),
        gap=(lambda: dls(rows(case('odd', mask=lambda m: m*100))), ValueError,
            ('100','200','0, 1, 2 … without a gap','codes=')),
        half=(lambda: dls(rows(case('half', mask=lambda m: m*.5))), ValueError,
            ('half.nii','whole numbers','found [0.5','probability map')),
        grid=(lambda: dls(rows(case('off', mask_affine=affine_of(origin=(5,0,0))))), ValueError,
            ("case 'off'",'one grid','images/off.nii','labels/off.nii','origin','resample')),
        channels=(lambda: dls(rows(two)), ValueError, ("case 'two' has 2",'has 1','same number')),
        column=(lambda: dls(rows(), image_col='scan'), KeyError, ('scan','image','mask')),
        group=(lambda: dls(rows(), group_col='patient'), KeyError, ('patient','image')),
        one_group=(lambda: dls(rows().assign(subject='a')), ValueError, ('two groups','found 1',"'a'",'finer groups')),
        share=(lambda: dls(rows(), valid_pct=1.5), ValueError, ('valid_pct','between 0 and 1','1.5')),
        norm=(lambda: dls(rows(), normalize='zscoer'), ValueError, ('normalize','zscore','zscoer')),
        spacing=(lambda: dls(rows(), spacing=(1,-1,1)), ValueError, ('spacing','above 0','-1')),
        patch=(lambda: dls(rows(), patch=(8,8)), ValueError, ('patch','3','(8, 8)')),
        empty=(lambda: dls(rows()[:0]), ValueError, ('no rows',)),
        which_learner=(lambda: unet2d_learner(loaders[3]), ValueError, ('unet2d_learner','volumes','unet3d_learner')),
        depth=(lambda: unet3d_learner(loaders[3], depth=6, nf=2), ValueError,
            ('patch 16×16×16','total stride 32','use 32','fewer levels')),
        network=(lambda: unet3d_learner(loaders[3], 'SegRestNet'), ValueError, ('SegRestNet','close: SegRes')),
        net_arg=(lambda: unet3d_learner(loaders[3], dept=3), TypeError,
            ("argument 'dept'","did you mean 'depth'",'it takes')),
        n_in=(lambda: learn.predict_volume(tmp_path/two['image']), ValueError, ('two.nii','1 channel','found 2')),
        no_place=(lambda: learn.predict_volume(TensorVolume(torch.zeros(1,8,8,8))), ValueError,
            ('no affine','Set `t.affine`')),
        post=(lambda: learn.predict_volume(path/df.image[0], post='keep_biggest'), ValueError,
            ('keep_biggest','keep_largest')),
        overlap=(lambda: learn.predict_volume(path/df.image[0], overlap=1), ValueError,
            ('overlap','under 1','found 1')),
        tta=(lambda: learn.predict_volume(path/df.image[0], tta=(5,)), ValueError, ('tta','0, 1 or 2','5')),
        gone=(lambda: learn.predict_volume(path/'none.nii'), FileNotFoundError, ('none.nii','no such file','path')),
        folder=(lambda: learn.predict_folder(tmp_path/'nowhere', tmp_path/'o'), FileNotFoundError,
            ('nowhere','no image matches','Check `path`')),
        suffix=(lambda: learn.predict_volume(path/df.image[0]).save(tmp_path/'x.jpg'), ValueError,
            ('x.jpg','.nii.gz',"found '.jpg'")),
        budget=(lambda: learn.fit_for(0), ValueError, ('minutes','more than 0','found 0')),
        loaded=(lambda: learn.evaluate(df[:0]), ValueError, ('no cases','DataFrame')))
    wrong = []
    for k,(f,kind,parts) in table.items():
        try: f()
        except kind as e:
            lost = [p for p in parts if p not in str(e)]
            if lost: wrong.append(f'{k}: {lost} are not in: {e}')
        except Exception as e: wrong.append(f'{k}: expected {kind.__name__}, found {type(e).__name__}: {e}')
        else: wrong.append(f'{k}: no error')
    assert not wrong, '\n'.join(wrong)

def test_law_9_in_a_worker_too(study, tmp_path):
    "The message survives the way through fastai's collation and its workers."
    df = pd.DataFrame([write_case(tmp_path, f'g{i}') for i in range(3)]+[write_case(tmp_path, 'bad',
            mask=lambda m: m*90)])
    block = DataBlock((VolumeBlock, VolumeMaskBlock(CODES)), get_x=CaseFiles('image', tmp_path),
            get_y=CaseFiles('mask', tmp_path), splitter=IndexSplitter([0]), item_tfms=PatchTransform((8,8,8)))
    with pytest.raises(ValueError, match=r'bad\.nii.*\[90, 180\]'):
        for _b in block.dataloaders(df, bs=1, device='cpu', num_workers=1).train: pass

# ---- 10

def trained(dls, workers, **kwargs):
    dls = type(dls)(*[d.new(num_workers=workers) for d in dls.loaders], path=dls.path, device='cpu')
    set_seed(7)
    for d in dls.loaders: d.rng = random.Random(7)
    learn = (unet3d_learner if get_plan(dls).ndim==3 else unet2d_learner)(dls, nf=4, depth=2, **kwargs)
    set_seed(7)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    return learn

@pytest.mark.parametrize('ndim', (3,2))
def test_law_10_workers_change_nothing(loaders, study, ndim):
    "Trained from one seed with no workers and with two: the same weights, scores and predictions, to the last bit."
    a,b = [trained(loaders[ndim], w) for w in (0,2)]
    for (k,v),w in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        assert torch.equal(v, w), f'{k} differs'
    assert np.array_equal(a.recorder.values[-1], b.recorder.values[-1], equal_nan=True)
    files = [study[0]/o for o in study[1].image[:3]]
    assert torch.equal(preds_of(a, files, num_workers=0), preds_of(b, files, num_workers=2))

@pytest.mark.parametrize('patch,kw', [((16,16,16), dict(arch='SegResNet', init_filters=8)),
        ((16,16,16), dict(nf=4, depth=4)), ((2,16,16), dict(nf=4, depth=2, strides=[(1,2,2)], kernels=3)),
        ((32,32,32), dict(nf=8, depth=4))], ids=['SegResNet','short','thin','plain'])
def test_law_10_fast_gradients_are_the_gradients(study, tmp_path, patch, kw):
    """What `fast=True` learns from is what plain float32 learns from, at every size a network comes down to: each
    gradient agrees to the precision of bfloat16."""
    path,df = study
    dls = VolumeDataLoaders.from_df(df, path, codes=CODES, spacing=.5, patch=patch, bs=2, samples_per_case=1,
                                    batch_tfms=None, cache=tmp_path, **QUIET)
    x,y = dls.one_batch()
    grads = []
    for fast in (False,True):
        set_seed(0)
        for _ in range(3):                                                       # what was freed before must not matter
            junk = [torch.full((n,), 1e4) for n in (64,1000,16000,64000)]
            del junk
            learn = unet3d_learner(dls, **kw, fast=fast)
            m = learn.model.eval()                                               # no dropout, and no drift
            if fast: m.load_state_dict(state)
            else: state = {k:v.clone() for k,v in m.state_dict().items()}  # noqa: F841, used in the second pass
            m.zero_grad()
            learn.loss_func(m(x.as_subclass(Tensor)), y).backward()
            g = {k:p.grad.flatten().clone() for k,p in m.named_parameters() if p.grad is not None and p.ndim>1}
            if not fast: break
            for k,v in g.items():
                assert torch.isfinite(v).all(), f'{k}: the gradient is not finite'
                if grads[0][k].norm()>1e-4*max(o.norm() for o in grads[0].values()):
                    assert F.cosine_similarity(v, grads[0][k], 0)>.8, f'{k}: the gradient points elsewhere'
        grads.append(g)

@pytest.mark.parametrize('ndim', (3,2))
def test_law_10_machine_without_bfloat16(learner, study, monkeypatch, ndim):
    "Where the processor has no bfloat16, `fast=True` is channels-last float32, and all goes on."
    import fastmed.learn.fast as room
    monkeypatch.setattr(room, 'has_bf16', lambda device: False)
    learn = learner(ndim)
    fn = study[0]/study[1].image[0]
    seen = set()
    for m in learn.model.modules():
        if isinstance(m, (nn.Conv2d,nn.Conv3d)): m.register_forward_hook(lambda m,x,out: seen.add(out.dtype))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        finite(learn)
    same_place(learn.predict_volume(fn), fn)
    assert seen=={torch.float32}, 'bfloat16 is not imitated'

def test_law_10_random_item_transforms_too(study, tmp_path):
    "A random transform of TorchIO on single items draws the same with workers and without."
    import torchio as tio
    path,df = study
    def batches(w):
        dls = VolumeDataLoaders.from_df(df, path, codes=CODES, spacing=None, patch=8, batch_tfms=None, bs=2,
                                        samples_per_case=1, normalize='none',
                                        item_tfms=TorchIOTransform(tio.RandomNoise(std=(.1,2.))), cache=tmp_path,
                                        device='cpu', num_workers=w)
        set_seed(3)
        for d in dls.loaders: d.rng = random.Random(3)
        return torch.cat([b[0].as_subclass(Tensor) for b in dls.train])
    assert torch.equal(batches(0), batches(2))

def test_law_10_epochs_differ_and_validation_does_not(loaders):
    "The draw of training patches is new in each epoch; that of validation patches is not."
    tr,va = loaders[3].train.new(shuffle=False, batch_tfms=None, drop_last=False, random=True),loaders[3].valid
    first = lambda dl: torch.cat([b[0].as_subclass(Tensor) for b in dl])
    tr.after_batch.fs.clear() if hasattr(tr.after_batch.fs, 'clear') else None
    assert torch.equal(first(va), first(va)) and not torch.equal(first(tr), first(tr))

def test_law_10_cpu_without_workers_is_the_default_there(study, tmp_path):
    "On a CPU nothing has to be said: no workers, which would only take cores from the training."
    path,df = study
    dls = VolumeDataLoaders.from_df(df, path, codes=CODES, spacing=None, patch=8, cache=tmp_path, device='cpu')
    assert dls.train.fake_l.num_workers==0 and next(unet3d_learner(dls, nf=2,
            depth=2).model.parameters()).device.type=='cpu'
