"""On a GPU: the answers of the CPU, training of every kind, files that move between the two, memory. Skipped where
there is none."""
import gc

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import CODES, affine_of, python, write_case
from torch import Tensor

from fastmed.all import *
from fastmed.core import ResourceError
from fastmed.predict.memory import MemoryCallback

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
MAKERS = {3:(VolumeDataLoaders,unet3d_learner), 2:(SliceDataLoaders,unet2d_learner)}
LOOKS = [dict(), dict(tta='flips'), dict(tta=['rotate','scale'])]

def raw(t): return t.as_subclass(Tensor).cpu()
def quiet_fit(learn, n=1, lr=None, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, **kw)
    return learn
def on_gpu(learn): return all(p.is_cuda for p in learn.model.parameters())

@pytest.fixture(scope='module')
def gpu(study, tmp_path_factory):
    "DataLoaders on the GPU: `gpu(ndim, **kwargs)`"
    path,df = study
    cache = tmp_path_factory.mktemp('cache')
    return lambda ndim=3, **kw: MAKERS[ndim][0].from_df(df, path,
            **{**dict(codes=CODES, valid_pct=.25, spacing=1.25, patch=16, bs=2, samples_per_case=2, num_workers=0,
                      device='cuda', cache=cache), **(dict(axis=2, context=1) if ndim==2 else {}), **kw})

@pytest.fixture
def pair(learner, tmp_path):
    "One trained network on the CPU and on the GPU, through a model file"
    def make(ndim):
        save_model(learner(ndim), fn:=tmp_path/f'm{ndim}.safetensors')
        return load_model(fn, 'cpu'),load_model(fn, 'cuda')
    return make

# ---- answers

@pytest.mark.parametrize('ndim', (3,2))
def test_answers_are_those_of_the_cpu(pair, study, tmp_path, ndim):
    path,df = study
    a,b = pair(ndim)
    assert on_gpu(b) and not on_gpu(a)
    new = tmp_path/write_case(tmp_path, 'new', affine_of('PIL', (.8,1.4,2.), (5,6,7)), (34,22,15), seed=99)['image']
    for fn in (path/df.image[2], new):
        for kw in LOOKS:
            (m,p),(n,q) = [l.predict_volume(fn, proba=True, **kw) for l in (a,b)]
            assert m.shape==n.shape and np.array_equal(m.affine, n.affine) and not n.is_cuda
            # bfloat16 and TF32 on the way
            assert (raw(p)-raw(q)).abs().max()<.1 and (raw(p)-raw(q)).abs().mean()<3e-3 and (raw(m)
                    ==raw(n)).float().mean()>.99
    full = df[:3].assign(image=[str(path/o) for o in df.image[:3]], mask=[str(path/o) for o in df['mask'][:3]])
    x,y = [l.evaluate(full) for l in (a,b)]
    assert (x.status==y.status).all() and np.abs(x.dice-y.dice).max()<.02

@pytest.mark.parametrize('ndim', (3,2))
def test_float32_answers_to_rounding(learner, study, ndim, monkeypatch):
    "Without bfloat16 and TF32 what is left is the order of sums"
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    path,df = study
    l = learner(ndim, fast=False)
    m,p = l.predict_volume(path/df.image[1], proba=True)
    l.model.cuda()
    n,q = l.predict_volume(path/df.image[1], proba=True)
    assert (raw(p)-raw(q)).abs().max()<1e-3 and (raw(m)==raw(n)).float().mean()>.999

def test_an_ensemble_and_its_uncertainty(pair, learner, study, tmp_path):
    path,df = study
    fn = path/df.image[1]
    for i in range(3):
        l = learner(3)
        with torch.no_grad():
            for p in l.model.parameters(): p.add_(.05*i*p.std().nan_to_num(0.))
        save_model(l, tmp_path/f'{i}.safetensors')
    fs = [tmp_path/f'{i}.safetensors' for i in range(3)]
    a,b = [Ensemble(fs, device=d) for d in ('cpu','cuda')]
    (m,p),(n,q) = [e.predict_volume(fn, proba=True) for e in (a,b)]
    assert (raw(p)-raw(q)).abs().mean()<3e-3 and (raw(m)==raw(n)).float().mean()>.99
    u,v = [e.uncertainty(fn) for e in (a,b)]
    assert (raw(u.entropy)-raw(v.entropy)).abs().mean()<5e-3
    save_model(b, tmp_path/'e.safetensors')
    assert torch.equal(raw(load_model(tmp_path/'e.safetensors', 'cuda').predict_volume(fn)), raw(n))
    assert (raw(Ensemble(fs, device='cuda', lazy=True).predict_volume(fn))==raw(n)).all()

def test_an_ensemble_takes_one_member_and_the_weights(study, tmp_path):
    path,df = study
    fs = []
    dls = VolumeDataLoaders.from_df(df, path, codes=CODES, valid_pct=.25, patch=16, bs=2, num_workers=0, device='cuda',
                                    cache=tmp_path/'c')
    for i in range(5):
        set_seed(i)
        fs.append(save_model(unet3d_learner(dls, nf=16, depth=3), tmp_path/f'{i}.safetensors'))
    weights = sum(p.numel()*4 for p in load_model(fs[0], 'cpu').model.parameters())
    def most(make):
        torch.cuda.empty_cache()
        base = torch.cuda.memory_allocated()
        l = make()
        l.predict_volume(path/df.image[0])
        torch.cuda.reset_peak_memory_stats()
        l.predict_volume(path/df.image[0])
        res = torch.cuda.max_memory_allocated()-base
        del l
        gc.collect()
        return res
    one = most(lambda: load_model(fs[0], 'cuda'))
    five = most(lambda: Ensemble(fs, device='cuda'))
    lazy = most(lambda: Ensemble(fs, device='cuda', lazy=True))
    assert five<=one+4*weights+1e6 and lazy<=one+1e6, (one, five, lazy, weights)

# ---- training

@pytest.mark.parametrize('workers', (0,2))
@pytest.mark.parametrize('ndim', (3,2))
def test_it_learns(gpu, ndim, workers, tmp_path):
    set_seed(0)
    dls = gpu(ndim, num_workers=workers, samples_per_case=4)
    x,y = dls.one_batch()
    assert x.is_cuda and y.is_cuda
    l = quiet_fit(MAKERS[ndim][1](dls, nf=4, depth=2, path=tmp_path, cbs=CostCallback()), 14, 3e-2)
    assert on_gpu(l) and np.mean(l.recorder.losses[-4:])<.8*np.mean(
            l.recorder.losses[:4]) and l.evaluate().summary().loc['all','mean']>.4
    assert 0<l.cost.rows[-1]['peak_mb']<3000
    l.show_results(max_n=2)
    x[0].show()

def test_the_same_bits_twice(gpu, tmp_path):
    def run():
        set_seed(3, reproducible=True)
        l = quiet_fit(unet3d_learner(gpu(), nf=4, depth=2, path=tmp_path, fast=False), 2, 1e-2)
        return torch.stack(list(l.recorder.losses)),[p.detach().clone() for p in l.model.parameters()]
    was = torch.are_deterministic_algorithms_enabled()
    try: (a,p),(b,q) = run(),run()
    finally: torch.use_deterministic_algorithms(was)
    assert torch.equal(a, b) and all(torch.equal(i, j) for i,j in zip(p, q))

@pytest.mark.parametrize('flat', (False,True))
def test_one_draw_moves_a_batch_alike(flat):
    "Grids, blur and fields on the GPU and on the CPU; noise alone has a source of its own there"
    size = (20,18) if flat else (20,18,16)
    kw = {k:1. for k in ('p_rotate','p_scale','p_elastic','p_contrast','p_brightness','p_gamma','p_blur','p_low_res',
                         'p_bias')}
    set_seed(0)
    x,y = torch.rand(3,1,*size),torch.randint(0, 3, (3,*size))
    b = (TensorSlice(x),TensorSliceMask(y)) if flat else (TensorVolume(x),TensorVolumeMask(y))
    for t in volume_tfms(max_elastic=.3, max_bias=.3, flips=(0,), max_noise=0., **kw):
        p = t.draw(3, size)
        (i,m),(j,n) = t.apply(b, p),t.apply(tuple(o.cuda() for o in b), p)
        assert j.is_cuda and n.is_cuda and type(j) is type(b[0])
        assert (raw(i)-raw(j)).abs().max()<2e-3 and (raw(m)==raw(n)).float().mean()>.999
        assert t.name.startswith('Spatial') or not torch.equal(raw(i), x)

def test_resume_goes_on_as_if_nothing_had_been(gpu, tmp_path):
    class Out(Callback):
        def after_batch(self):
            if self.training and self.epoch==1 and self.iter==1: raise KeyboardInterrupt
    def make():
        set_seed(3, reproducible=True)
        return unet3d_learner(gpu(), nf=4, depth=2, path=tmp_path, fast=False)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        whole = quiet_fit(make(), 3, 1e-2)
        with pytest.raises(KeyboardInterrupt): quiet_fit(make(), 3, 1e-2, cbs=[ResumeCallback('r.pth', 1), Out()])
        again = quiet_fit(make(), 3, 1e-2, cbs=ResumeCallback('r.pth', 1))
    finally: torch.use_deterministic_algorithms(was)
    assert all(torch.equal(i, j) for i,j in zip(whole.model.parameters(), again.model.parameters()))

@pytest.mark.parametrize('kw', [dict(arch='VNet'), dict(deep_supervision=True), dict(n_out=3, fast=False)], ids=str)
def test_networks_train_and_answer(gpu, study, tmp_path, kw):
    path,df = study
    kw = dict(kw)
    arch = kw.pop('arch', None)
    a = [arch] if arch else []
    l = quiet_fit(unet3d_learner(gpu(), *a, **({} if arch else dict(nf=4, depth=2)), path=tmp_path, **kw))
    m = l.predict_volume(path/df.image[0])
    assert m.shape==load_volume(path/df.image[0]).shape[1:]
    l.export('e.pkl')
    assert (raw(load_learner(tmp_path/'e.pkl', cpu=False).predict_volume(path/df.image[0]))==raw(m)).all()
    save_model(l, tmp_path/'m.safetensors')
    assert (raw(load_model(tmp_path/'m.safetensors', 'cuda').predict_volume(path/df.image[0]))
                           ==raw(m)).float().mean()>.999

def test_encoders_of_timm(gpu, tmp_path):
    l = quiet_fit(unet2d_learner(gpu(2, context=0, patch=(32,32,1)), arch='resnet18', pretrained=False, path=tmp_path))
    assert on_gpu(l)
    l.save_encoder('enc')
    k = unet2d_learner(gpu(2, context=0, patch=(32,32,1)), arch='resnet18', pretrained=False, path=tmp_path)
    k.load_encoder('enc')
    assert on_gpu(quiet_fit(k))

def test_trained_here_answers_where_there_is_none(gpu, study, tmp_path):
    path,df = study
    l = quiet_fit(unet3d_learner(gpu(), nf=4, depth=2, path=tmp_path), 3, 1e-2)
    l.export('e.pkl')
    save_model(l, tmp_path/'m.safetensors')
    fn = path/df.image[0]
    m,p = l.predict_volume(fn, proba=True)
    python("import sys, torch, numpy as np; from fastmed.all import *\nassert not torch.cuda.is_available()\nfor n,l "
           "in enumerate((load_learner(sys.argv[1]+'/e.pkl'), load_model(sys.argv[1]+'/m.safetensors'))): "
           "np.save(f'{sys.argv[1]}/{n}.npy', l.predict_volume(sys.argv[2], proba=True)[1].numpy())", tmp_path, fn,
           CUDA_VISIBLE_DEVICES='')
    for n in (0,1): assert np.abs(np.load(tmp_path/f'{n}.npy')-raw(p).numpy()).mean()<5e-3

def test_pretraining_without_labels(gpu, study, tmp_path):
    path,df = study
    dls = VolumeDataLoaders.from_df(df[['case','image']], path, mask_col=None, valid_pct=.25, spacing=1.25, patch=16,
                                    bs=2, num_workers=0, device='cuda', cache=tmp_path/'c')
    l = quiet_fit(restoration_learner(dls, nf=4, depth=2, path=tmp_path), 2)
    assert on_gpu(l) and np.isfinite(l.recorder.losses[-1].item())
    l.save_encoder('enc')
    k = unet3d_learner(gpu(), nf=4, depth=2, path=tmp_path)
    k.load_encoder('enc')
    quiet_fit(k)

def test_too_large_a_batch_is_told(gpu, tmp_path):
    l = unet3d_learner(gpu(bs=2), nf=4, depth=2, path=tmp_path)
    l.remove_cbs([o for o in l.cbs if type(o).__name__=='MemoryCallback'])
    l.add_cb(MemoryCallback(1e-3))
    with pytest.raises(ResourceError, match='GPU'): quiet_fit(l)

# ---- whole scans

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "Sixteen masks, every second with a ball, a label and a size"
    import nibabel as nib
    path = tmp_path_factory.mktemp('cases')
    rows = []
    for i in range(16):
        g = np.stack(np.mgrid[:24,:24,:20], -1)-np.random.default_rng(i).uniform(9, 12, 3)
        x = ((abs(g[...,0])<=1.2)|(abs(g[...,1])<=1.2))&(abs(g)<7).all(-1)
        if i%2: x |= (g**2).sum(-1)<=16
        nib.save(nib.Nifti1Image(x.astype(np.uint8), affine_of('RAS', (1,1,1))), path/f'{i}.nii')
        rows.append(dict(case=f'g{i}', image=f'{i}.nii', ill=['no','yes'][i%2], cubic=float(x.sum())))
    return path,pd.DataFrame(rows)

@pytest.mark.parametrize('arch,label', [('shape_net','ill'), ('small_resnet','ill'), ('resnet18','ill'),
        ('densenet121','ill'), ('small_resnet','cubic'), ('shape_net','cubic')])
def test_whole_scans(cases, tmp_path, arch, label):
    path,df = cases
    set_seed(0)
    dls = VolumeDataLoaders.from_df(df, path, label_col=label, bs=4, valid_pct=.3, normalize='none',
                                    batch_tfms=[] if arch=='shape_net' else 'auto', num_workers=0, device='cuda',
                                    cache=tmp_path/'c')
    l = quiet_fit((classifier_learner if label=='ill' else regression_learner)(dls, arch, path=tmp_path), 4, 1e-2)
    assert on_gpu(l)
    l.model.eval()
    p = l.predict(str(path/df.image[1]))
    save_model(l, tmp_path/'m.safetensors')
    q = load_model(tmp_path/'m.safetensors', 'cpu').predict(str(path/df.image[1]))
    assert np.allclose(raw(torch.as_tensor(p[2])), raw(torch.as_tensor(q[2])), atol=.05, rtol=.05)
    ev = l.evaluate()
    assert (ev.status=='ok').all()
    if arch=='small_resnet' and label=='ill':
        it = l.interpret(n_boot=5)
        it.plot_worst(2)
        x = l.case_input(str(path/df.image[1]))
        assert not grad_cam(l, str(path/df.image[1])).is_cuda and not grad_cam(l, x.cpu()).is_cuda and grad_cam(l,
                x.cuda()).is_cuda
        l.predict(str(path/df.image[1]), tta='flips')

# ---- studies

def test_studies(study, tmp_path):
    path,df = study
    full = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    kw = dict(codes=CODES, folds=2, budget=dict(updates=4), nf=4, depth=2, bs=2, samples_per_case=2, patch=16,
              spacing=1.25, device='cuda')
    c = Comparison(full, {'3D':dict(ndim=3), '2D':dict(ndim=2, patch=(16,16,1), axis=2)}, path=tmp_path/'c',
                   cache=tmp_path/'s', **kw).run()
    assert len(c.results) and (c.cost.peak_mb>0).all()
    v = cross_validate(full, path=tmp_path/'v', cache=tmp_path/'s', ndim=3, group_col='subject', **kw)
    assert v.ensemble().predict_volume(full.image[0]).shape==load_volume(full.image[0]).shape[1:]
