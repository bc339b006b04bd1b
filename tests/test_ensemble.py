"Ensembles and test-time augmentation: equal members, means by hand, grids, files, memory, uncertainty."
import gc
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import CODES, Nearest, affine_of, python, write_case
from torch import Tensor, nn

from fastmed.all import (
    TTA,
    Ensemble,
    TensorVolume,
    UNet,
    VolumeDataLoaders,
    load_learner,
    load_model,
    load_volume,
    save_model,
    set_seed,
    unet3d_learner,
)
from fastmed.data.plan import patch_plan
from fastmed.learn.uncertainty import MEASURES, RunningMean, UncertainEvaluation, entropy, finds_worst
from fastmed.predict.tta import TTAView, tta_views
from fastmed.predict.windows import slide_window


def raw(t): return t.as_subclass(Tensor)

@pytest.fixture
def others(learner):
    "Three Learners that do not agree: dict ndim → list."
    def make(ndim, n=3):
        res = [learner(ndim) for _ in range(n)]
        for i,l in enumerate(res[1:], 1):
            g = torch.Generator().manual_seed(i)
            with torch.no_grad():
                for p in l.model.parameters(): p.add_(.15*p.std().nan_to_num(0.)*torch.randn(p.shape, generator=g))
        return res
    return make

# ---- the mean

@pytest.mark.parametrize('ndim', (3,2))
def test_members_see_the_same_patches_of_training(learner, ndim):
    learn = learner(ndim)
    def seen(o):
        set_seed(1)
        learn.dls.train.rng.seed(1)
        with learn.no_bar(), learn.no_logging(): return o.get_preds(dl=learn.dls.train)
    (p,t),(q,u) = seen(learn),seen(Ensemble([learn]*2))
    assert torch.equal(t, u) and torch.allclose(p, q, atol=1e-5)

@pytest.mark.parametrize('ndim', (3,2))
def test_equal_members_answer_as_one(learner, study, ndim):
    "Mask and probabilities to the last bit, on a grid of another order, plain and with looks"
    path,df = study
    learn = learner(ndim)
    for k in (2,5):
        ens = Ensemble([learn]*k)
        for fn in df.image[1:3]:
            for kw in (dict(), dict(tta=['rotate','flips'])):
                (m,p),(n,q) = [l.predict_volume(path/fn, proba=True, **kw) for l in (learn,ens)]
                assert torch.equal(raw(m), raw(n)) and torch.equal(raw(p), raw(q)) and np.array_equal(m.affine,
                        n.affine) and m.shape==n.shape
                assert torch.equal(raw(ens.predict_volume(path/fn, **kw)), raw(m))

def test_equal_members_of_one_channel(loaders, study, tmp_path):
    path,df = study
    two = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    dls = VolumeDataLoaders.from_df(two, codes={'background':0,'ball':[1,2]}, patch=16, bs=2, spacing=1.25,
                                    valid_pct=.25, cache=tmp_path, device='cpu')
    learn = unet3d_learner(dls, nf=4, depth=2, n_out=1)
    (m,p),(n,q) = [l.predict_volume(path/df.image[0], proba=True) for l in (learn,Ensemble([learn]*3))]
    assert torch.equal(raw(m), raw(n)) and torch.equal(raw(p), raw(q)) and len(p)==2

@pytest.mark.parametrize('ndim', (3,2))
def test_mean_is_that_of_the_members(others, study, ndim):
    path,df = study
    ls = others(ndim)
    fn = path/df.image[2]
    ps = torch.stack([raw(l.predict_volume(fn, proba=True)[1]) for l in ls])
    assert (ps[0]-ps[1]).abs().max()>.05
    m,p = Ensemble(ls).predict_volume(fn, proba=True)
    # labels come back by the nearest voxel, probabilities by a line through two
    assert (raw(p)-ps.mean(0)).abs().max()<2e-3 and (raw(m)==ps.mean(0).argmax(0)).float().mean()>.97

def test_file_or_memory_makes_no_difference(others, study):
    path,df = study
    ls = others(3)
    a,b = Ensemble(ls),Ensemble(ls)
    b.about[0].bytes = 1e12
    (m,p),(n,q) = [e.predict_volume(path/df.image[1], proba=True) for e in (a,b)]
    assert torch.equal(raw(m), raw(n)) and torch.equal(raw(p), raw(q))
    assert RunningMean(3, (30,30,30), most=1e5).on_disk and not RunningMean(3, (30,30,30), most=1e6).on_disk

def test_slices_and_volumes_together(others, study):
    path,df = study
    a,b = others(3, 1)[0],others(2, 2)[1]
    fn = path/df.image[3]
    ens = Ensemble([a,b])
    ps = [raw(l.predict_volume(fn, proba=True)[1]) for l in (a,b)]
    assert (raw(ens.predict_volume(fn, proba=True)[1])-(ps[0]+ps[1])/2).abs().max()<2e-3
    with pytest.warns(UserWarning, match='trained on slices across axis'):
        every = raw(b.predict_volume(fn, proba=True, axes='all')[1])
    # of the volume model the one answer counts as much as the three of the other
    assert (raw(ens.predict_volume(fn, proba=True, axes='all')[1])-(ps[0]+every)/2).abs().max()<3e-3
    assert len(ens.uncertainty(fn, axes='all').table)==2
    with pytest.raises(ValueError, match='no slicing direction'): Ensemble([a]).predict_volume(fn, axes='all')

def test_unlike_grids_meet_on_the_scans_own(study, learner, tmp_path):
    path,df = study
    full = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    kw = dict(codes=CODES, patch=16, bs=2, valid_pct=.25, cache=tmp_path/'c', device='cpu', samples_per_case=1)
    ls = [unet3d_learner(VolumeDataLoaders.from_df(full, spacing=s, normalize='none', **kw), Nearest)
                                                   for s in (1.25,(1,1,1),None)]
    new = write_case(tmp_path, 'new', affine_of('PIL', (.8,1.4,2.), (5,6,7)), (34,22,15), seed=99)
    fn = tmp_path/new['image']
    t = load_volume(fn)
    m,p = Ensemble(ls).predict_volume(fn, proba=True)
    assert m.shape==t.shape[1:] and np.allclose(m.affine,
                                                t.affine) and m.orientation=='PIL' and torch.allclose(raw(p).sum(0),
            torch.ones(m.shape), atol=1e-4)
    ps = [raw(l.predict_volume(fn, proba=True)[1]) for l in ls]
    assert (raw(p)-sum(ps)/3).abs().max()<3e-3
    u = Ensemble(ls).uncertainty(fn)
    assert torch.equal(raw(u.mask), raw(m)) and u.entropy.shape==(1,*m.shape) and np.allclose(u.entropy.affine,
            m.affine)
    assert (raw(u.entropy)[0]-entropy(sum(ps)/3)).abs().max()<2e-2 and float(u.mutual_info.min())>=0
    (a,pa),(b,pb) = [l.predict_volume(fn, proba=True) for l in (ls[0],Ensemble([ls[0],ls[0]]))]
    assert torch.equal(raw(a), raw(b)) and torch.equal(raw(pa), raw(pb))

def test_members_that_do_not_fit_are_refused(learner, loaders, study, tmp_path):
    path,df = study
    learn = learner(3)
    full = df.assign(image=[[str(path/o)]*2 for o in df.image], mask=[str(path/o) for o in df['mask']])
    two = unet3d_learner(VolumeDataLoaders.from_df(full, codes=CODES, patch=16, bs=2, spacing=1.25, valid_pct=.25,
                                                   cache=tmp_path, device='cpu'), nf=4, depth=2)
    with pytest.raises(ValueError, match='channels 1.*has 2'): Ensemble([learn, two])
    with pytest.raises(ValueError, match='post-processes'):
        l = learner(3)
        l.post = ('keep_largest',)
        Ensemble([learn, l])
    assert Ensemble([learn, l], post='keep_largest').post==('keep_largest',)
    with pytest.raises(ValueError, match='not a Learner of fastmed'): Ensemble([nn.Conv3d(1,1,1)])
    with pytest.raises(FileNotFoundError, match='no model'): Ensemble(path)
    (tmp_path/'x.pkl').write_bytes(b'no')
    with pytest.raises(ValueError, match='x.pkl: not an exported'): Ensemble([tmp_path/'x.pkl'], trust=True)
    with pytest.raises(ValueError, match='x.pkl: is not a .safetensors file.*trust=True'): Ensemble([tmp_path/'x.pkl'])
    with pytest.raises(ValueError, match='1 channel.*found 2'): Ensemble([learn]).predict_volume(full.image[0])
    with pytest.raises(ValueError, match='1 channel.*found 2'): Ensemble([learn]).uncertainty(full.image[0])
    with pytest.raises(TypeError, match='known are'): Ensemble([learn]).evaluate(df, overlp=.3)

# ---- files

def test_one_file_and_a_fresh_process(others, study, tmp_path):
    "Saved in one file, opened in a fresh process: the same bits; and nothing of it is a pickle"
    path,df = study
    ens = Ensemble([*others(3, 2), others(2, 1)[0]])
    fn = path/df.image[2]
    save_model(ens, tmp_path/'e.safetensors', post='keep_largest')
    want,p = ens.predict_volume(fn, proba=True, post='keep_largest')
    python(f"""
import sys, torch, numpy as np
from fastmed.all import *
torch.set_num_threads({torch.get_num_threads()})
e = load_model(sys.argv[1]+'/e.safetensors', 'cpu')
m,p = e.predict_volume(sys.argv[2], proba=True)
np.savez(sys.argv[1]+'/there.npz', m=m.numpy(), p=p.numpy(), n=len(e), post=e.post)
""", tmp_path, fn)
    with np.load(tmp_path/'there.npz') as z:
        assert np.array_equal(z['m'], want.numpy()) and np.array_equal(z['p'],
                p.numpy()) and int(z['n'])==3 and z['post'].tolist()==['keep_largest']
    assert b'pickle' not in (tmp_path/'e.safetensors').read_bytes()
    for l,n in zip(ens, 'ab'): save_model(l, tmp_path/f'{n}.safetensors')
    ens[2].path = tmp_path
    ens[2].export('c.pkl')
    for lazy in (False,True):
        mixed = Ensemble([tmp_path/'a.safetensors', tmp_path/'b.safetensors', tmp_path/'c.pkl'], lazy=lazy,
                         device='cpu', trust=True)
        assert torch.equal(raw(mixed.predict_volume(fn, post='keep_largest')),
                                                    raw(want)) and (mixed.members.loaded[0] is None)==lazy
    bad = bytearray((tmp_path/'e.safetensors').read_bytes())
    bad[len(bad)//2] ^= 1
    (tmp_path/'e.safetensors').write_bytes(bad)
    with pytest.raises(ValueError, match='bytes were changed'): load_model(tmp_path/'e.safetensors')

@pytest.mark.slow
def test_memory_is_that_of_one_member_and_the_weights(tmp_path):
    """The most that a prediction holds, in a fresh process: five members against one, of a scan whose probabilities
    would be much larger than the weights"""
    out = python("""
import sys, torch, numpy as np, nibabel as nib, pandas as pd
from fastmed.all import *
from fastmed.learn.pace import peak_memory, reset_peak
from phantoms import write_case
torch.set_num_threads(1)
tmp = Path(sys.argv[1])
codes = ['background']+[str(i) for i in range(1,24)]
rows = [dict(write_case(tmp, f'c{i}', shape=(24,24,24), seed=i)) for i in range(2)]
dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), path=tmp, codes=codes, patch=24, bs=1, samples_per_case=1,
                                spacing=None, normalize='zscore', valid_pct=.5, cache=tmp/'s', device='cpu')
for i in range(5): unet3d_learner(dls, nf=2, depth=1).export(f'{i}.pkl')     # small networks: what counts is the scan
x = TensorVolume(torch.randn(1,96,96,160), affine=np.eye(4))
ens = Ensemble(tmp, trust=True)
one = ens[0]
one.predict_volume(x, overlap=0)
def most(l):
    reset_peak('cpu')
    l.predict_volume(x, overlap=0)
    return peak_memory('cpu')
# the heap's holes and a processor's workspaces differ from call to call
a,b = min(most(one) for _ in range(2)),min(most(ens) for _ in range(3))
print(a, b, sum(o.bytes for o in ens.about), 24*x.numel()*4)
""", tmp_path)
    one,five,weights,probabilities = map(float, out.split()[-4:])
    assert five <= one+weights+probabilities/2, (f'{five/1e6:.0f} MB against {one/1e6:.0f} + {weights/1e6:.0f} MB; the '
                                                 f'probabilities are {probabilities/1e6:.0f} MB')

@pytest.mark.slow
def test_members_that_rest_take_no_memory(tmp_path):
    """Five large members read from files, in a fresh process: less than one in its own, and half the weights; and they
    answer as Learners in memory do"""
    python("""
import sys, pandas as pd
from fastmed.all import *
from phantoms import write_case
tmp = Path(sys.argv[1])
rows = [dict(write_case(tmp, f'c{i}', shape=(24,24,24), seed=i)) for i in range(2)]
dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), path=tmp, codes=['background','large','small'], patch=24, bs=1,
                                samples_per_case=1, spacing=None, valid_pct=.5, cache=tmp/'s', device='cpu')
for i in range(5):
    set_seed(i)
    save_model(unet3d_learner(dls, nf=24, depth=4), tmp/f'{i}.safetensors')
""", tmp_path)
    def most(what):
        return python(f"""
import sys, torch, numpy as np
from fastmed.all import *
from fastmed.learn.pace import peak_memory, reset_peak
torch.set_num_threads(1)
files = sorted(Path(sys.argv[1]).glob('*.safetensors'))
x = TensorVolume(torch.randn(1,24,24,24, generator=torch.Generator().manual_seed(0)), affine=np.eye(4))
l = {what}
reset_peak('cpu')
p = l.predict_volume(x, proba=True)[1]
print(peak_memory('cpu'), sum(f.stat().st_size for f in files), p.double().sum().item())
""", tmp_path).split()[-3:]
    one,weights,_ = map(float, most("load_model(files[0], 'cpu')"))
    five,_,a = map(float, most("Ensemble(files, device='cpu')"))
    _,_,b = map(float, most("Ensemble([load_model(f, 'cpu') for f in files])"))
    assert a==b and weights>5e7 and five<=one+weights/2, (
            f'{five/1e6:.0f} MB against {one/1e6:.0f} and weights of {weights/1e6:.0f} MB')

def test_read_as_needed_keeps_no_network(learner, study, tmp_path):
    "Neither after opening nor after an answer, by callbacks that are lent or otherwise"
    path,df = study
    fs = [save_model(learner(3), tmp_path/f'{i}.safetensors') for i in range(2)]
    def there():
        gc.collect()
        return sum(isinstance(o, UNet) for o in gc.get_objects())
    was = there()
    ens = Ensemble(fs, lazy=True, device='cpu')
    assert there()==was and ens.cbs
    ens.predict_volume(path/df.image[0])
    assert there()==was

# ---- looks

class Same(nn.Module):
    "Answers the same everywhere"
    def __init__(self, n_in, n_out, ndim=3):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, n_out))
        self.divisor = (1,)*ndim
    def forward(self, x): return self.w.view(1,-1,*(1,)*(x.ndim-2)).expand(len(x), -1, *x.shape[2:])

@pytest.mark.parametrize('tta', ['rotate', ['flips','rotate','scale','intensity'],
        TTA('all', rotate=(5,20), scale=(.1,.3))])
def test_looks_change_nothing_of_a_constant(study, loaders, tmp_path, tta):
    "A network that says the same everywhere, on scans whose corners a turned look does not see"
    path,df = study
    learn = unet3d_learner(loaders[3], Same, fast=False)
    for i in (1,2):
        m,p = learn.predict_volume(path/df.image[i], proba=True, tta=tta)
        want = torch.linspace(-1, 1, 3).softmax(0).view(3,1,1,1)
        assert (raw(p)-want).abs().max()<1e-3 and (raw(m)==2).all()
    p,_ = learn.tta(tta=tta)
    assert (raw(p)-torch.linspace(-1, 1, 3).softmax(0).view(1,3,1,1,1)).abs().max()<1e-5

def test_turned_looks_are_undone(tmp_path):
    """A network that answers voxel by voxel, on a smooth scan: the looks agree where they see it, in 3D, on slices, and
    with thick slices"""
    g = torch.stack(torch.meshgrid(*[torch.linspace(-2, 2, n) for n in (40,44,36)], indexing='ij'))
    x = torch.sin(g[0])+torch.cos(1.3*g[1])+g[2]
    point = lambda b: torch.cat([-b[:,:1], b[:,:1]], 1)
    for patch in ((20,24,16),(24,24,1),(64,64,64)):
        for sp in ((1,1,1),(1,1.2,2.5)):
            t = TensorVolume(x[None], affine=np.diag([*sp,1.]))
            plan = patch_plan(patch)
            ax = [a for a in range(3) if plan.ndim==3 or a!=plan.axis]
            for v in TTA('all', rotate=8, scale=.1).views(ax, spacing=sp)[1:]:
                plain = slide_window(t, point, plan, 2, proba=True)[1][1].float()
                p = slide_window(t, point, plan, 2, views=[TTAView(), v], proba=True)[1][1].float()
                assert (p-plain).abs().max()<.06 and (p-plain).abs().mean()<3e-3, (patch, sp, v)

def test_a_turn_is_a_turn():
    "Ninety degrees in a plane is a permutation of voxels, both ways"
    x = torch.randn(2,3,9,9,5)
    v = TTAView(axis=2, degrees=90.)
    y = v.apply(x, (9,9,5), (1,1,3))
    assert torch.allclose(y, x.rot90(1, (2,3)), atol=1e-5) or torch.allclose(y, x.rot90(-1, (2,3)), atol=1e-5)
    back,w = v.undo(y, (1,1,3))
    assert torch.allclose(back, x, atol=1e-5) and torch.allclose(w, torch.ones_like(w), atol=1e-5)

def test_looks_travel_and_are_refused(learner, study, tmp_path):
    path,df = study
    learn = learner(3)
    t = TTA(rotate=10, flips=(0,))
    learn.export('l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    fn = path/df.image[0]
    assert pickle.loads(pickle.dumps(t))==t and str(t)=='TTA(flips=(0,), rotate=10.0)' and len(tta_views(learn, t))==8
    assert torch.equal(raw(learn.predict_volume(fn, tta=t)),
                       raw(again.predict_volume(fn, tta=t))) and not torch.equal(raw(learn.predict_volume(fn,
            proba=True, tta=t)[1]), raw(learn.predict_volume(fn, proba=True)[1]))
    for bad,what in (('mirror','mirror'), (['flips','turn'],'turn'), ((0,'flips'),'0'), (7,'0, 1 or 2'), (2.5,'2.5')):
        with pytest.raises(ValueError, match=what): learn.predict_volume(fn, tta=bad)
    with pytest.raises(ValueError, match='adds no view'): learn.predict_volume(fn, tta=TTA())
    assert learn.evaluate(tta='scale').dice.notna().all()

# ---- uncertainty

def test_uncertainty_of_cases(others, study):
    path,df = study
    full = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    ens = Ensemble(others(3))
    ev = ens.evaluate(full, uncertainty=True)
    assert isinstance(ev,
            UncertainEvaluation) and set(MEASURES)<=set(ev) and len(ev)==16 and (ev.groupby('case').subject.first()
            ==df.set_index('case').subject).all()
    pd.testing.assert_frame_equal(ev.summary(), ens.evaluate(full).summary())
    t = ev.finds_worst(n_boot=200)
    assert list(t.index)==list(MEASURES) and (t.n==8).all() and t.auc.between(0,
            1).all() and (t.auc_low<=t.auc).all() and (t.rho<=t.rho_high).all()
    gone = pd.concat([full, full[:1].assign(case='gone', image='no.nii', subject='x')], ignore_index=True)
    assert ens.evaluate(gone, uncertainty=True).status.str.startswith('error').sum()==2

def test_finds_worst_knows_chance_and_truth():
    rng = np.random.default_rng(0)
    d = rng.random(60)
    t = finds_worst(d, pd.DataFrame(dict(right=-d, wrong=d, chance=rng.random(60), flat=np.ones(60))), np.arange(60)//2)
    assert t.loc['right',['rho','auc']].tolist()==[-1,1] and t.loc['wrong',['rho','auc']].tolist()==[1,
            0] and t.loc['chance','auc_low']<.5<t.loc['chance',
            'auc_high'] and np.isnan(t.rho['flat']) and t.auc['flat']==.5 and (t.n_worst==12).all()
