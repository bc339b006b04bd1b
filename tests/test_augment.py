"Batch augmentation: alignment of image and mask, known answers, replay, bad inputs"
import pickle

import numpy as np
import pytest
import torch
from fastai.data.all import Pipeline, TensorCategory
from scipy import ndimage as ndi
from torch import Tensor

from fastmed.core import TensorSlice, TensorSliceMask, TensorVolume, TensorVolumeMask
from fastmed.data.augment import *
from fastmed.data.augment import IntensityTfm, SpatialTfm

NO = dict(p_rotate=0., p_scale=0.)
QUIET = {f'p_{k}':0. for k in ('contrast','brightness','gamma','noise','blur','low_res','bias')}

def balls(n=4, size=(24,28,20), r=7.):
    "A ball off centre, image and mask; the image's edge is one voxel soft so that its half level is the mask's edge"
    g = np.meshgrid(*[np.arange(s)-s/2+.5 for s in size], indexing='ij')
    d = np.sqrt(sum((a-2*(i==0))**2 for i,a in enumerate(g)))
    im = np.clip(r-d+.5, 0, 1)
    m = (d<=r).astype('uint8')
    X,M = (TensorVolume,TensorVolumeMask) if len(size)==3 else (TensorSlice,TensorSliceMask)
    rep = lambda a,*s: torch.tensor(a).expand(*s, *size).clone()
    return X(rep(im.astype('float32'), n, 1)), M(rep(m, n))

def plain(t): return t.as_subclass(Tensor)
def dice(a, b): return (2*(a&b).sum()/(a.sum()+b.sum())).item()

@pytest.mark.parametrize('size', [(32,36,30),(48,40)])
@pytest.mark.parametrize('spacing', [None,'unlike'])
def test_image_and_mask_stay_aligned(size, spacing):
    torch.manual_seed(0)
    x,y = balls(8, size, r=11.)
    sp = None if spacing is None else (1.,1.5,2.)[:len(size)]
    t = SpatialTfm(sp, max_rotate=30., p_rotate=1., p_scale=1., max_elastic=.3, p_elastic=.7, flips=(0,1), p_flip=.5)
    xa,ya = t((x,y), split_idx=0)
    scores = [dice(plain(a)[0]>.5, plain(b)>0) for a,b in zip(xa,ya)]
    assert min(scores)>.95, scores
    assert len({round(float(b.sum())) for b in plain(ya)})>4       # each item has its own draw

@pytest.mark.parametrize('size', [(24,28,20),(48,40)])
def test_all_off_is_identity_and_costs_nothing(size):
    x,y = balls(3, size)
    for t in (SpatialTfm(**NO), IntensityTfm(**QUIET)):
        xa,ya = t((x,y), split_idx=0)
        assert xa is x and ya is y
    assert volume_tfms(**NO, **QUIET)==[]
    assert [type(t).__name__ for t in volume_tfms(**QUIET)]==['SpatialTfm']

def test_identity_items_are_untouched():
    x,y = balls(4)
    t = SpatialTfm()
    p = t.draw(4, x.shape[2:])
    p['angle'][1:] = 0
    p['zoom'][1:] = 1
    p['angle'][0] = 10
    xa,ya = t.apply((x,y), p)
    assert torch.equal(plain(xa)[1:], plain(x)[1:]) and torch.equal(plain(ya)[1:],
            plain(y)[1:]) and not torch.equal(plain(xa)[0], plain(x)[0])
    assert torch.equal(plain(x), plain(balls(4)[0]))            # the batch given is not changed

def test_deterministic_by_seed_and_replayable():
    x,y = balls(4)
    pipe = Pipeline(volume_tfms(max_elastic=.2, max_bias=.3, p_noise=1., p_blur=.5, p_low_res=.5, flips=(0,)),
                    split_idx=0)
    res = []
    for s in (1,1,2):
        torch.manual_seed(s)
        res.append(pipe((x,y)))
    assert all(torch.equal(a,b) for a,b in zip(res[0],res[1])) and not torch.equal(res[0][0], res[2][0])
    for t in volume_tfms(p_noise=1.):
        p = t.draw(4, x.shape[2:])
        a = t.apply((x,y), p)
        torch.rand(7)
        b = t.apply((x,y), p)
        assert all(torch.equal(u,v) for u,v in zip(a,b))

@pytest.mark.parametrize('size,spacing', [((20,24,18),(1.,1.,1.)), ((20,24,18),(1.,1.5,2.5)), ((40,30),(1.,1.)),
                         ((40,30),(.7,1.9))])
def test_rotation_and_zoom_against_scipy(size, spacing):
    "The content turns by +angle in mm; SciPy with the matrix written from the angle gives the same picture"
    rng = np.random.default_rng(0)
    d = len(size)
    a = ndi.gaussian_filter(rng.normal(size=size), 1.5).astype('float32')
    ang,zoom = 20.,1.15
    t = SpatialTfm(spacing, max_rotate=45.)
    p = t.draw(1, size)
    p['angle'] = torch.zeros(1, 3 if d==3 else 1)
    p['angle'][0,-1] = ang
    p['zoom'] = torch.tensor([zoom])
    p['flip'][:] = False
    x = (TensorVolume if d==3 else TensorSlice)(torch.tensor(a)[None,None])
    got = plain(t.apply((x,), p)[0])[0,0].numpy()
    c,s = np.cos(np.deg2rad(ang)),np.sin(np.deg2rad(ang))
    R = np.eye(d)
    R[:2,:2] = [[c,-s],[s,c]]
    D = np.diag(spacing)
    m = np.linalg.inv(D)@R.T@D/zoom
    mid = (np.array(size)-1)/2
    want = ndi.affine_transform(a, m, mid-m@mid, order=1, mode='nearest')
    np.testing.assert_allclose(got, want, atol=2e-4)

def test_unlike_spacing_turns_rigidly():
    "Two points keep their distance in mm"
    for size,sp in (((20,24,18),(1.,2.,2.9)), ((30,20),(1.,2.))):
        t = SpatialTfm(sp, max_rotate=90., p_rotate=1., max_scale=0.)
        e = np.array(size)*np.array(sp)/2
        for m in t.matrix(t.draw(5, size), size).double().numpy():
            R = np.diag(e)@m@np.diag(1/e)
            np.testing.assert_allclose(R@R.T, np.eye(len(size)), atol=1e-5)
            assert np.linalg.det(R)>0

def test_coarse_axis_stays_out():
    t = SpatialTfm((.5,.5,7.5), p_rotate=1., p_scale=1., max_elastic=.3, p_elastic=1.)
    x = TensorVolume(torch.arange(6.).expand(2,1,16,16,6).clone())
    y = TensorVolumeMask(torch.arange(6).expand(2,16,16,6).clone())
    torch.manual_seed(0)
    xa,ya = t((x,y), split_idx=0)
    torch.testing.assert_close(plain(xa), plain(x), atol=1e-4, rtol=0)
    assert torch.equal(plain(ya), plain(y))
    p = t.draw(4, (16,16,6))
    assert (p['angle'][:,:2]==0).all() and (p['angle'][:,2]!=0).all()

def test_elastic_does_not_fold():
    t = SpatialTfm(**NO, max_elastic=.4, p_elastic=1.)
    size = (32,32,32)
    torch.manual_seed(0)
    g = t.grid(t.draw(6, size), size, torch.arange(6)).flip(-1)
    J = torch.stack([torch.gradient(g, dim=i+1)[0] for i in range(3)], -1)
    assert torch.linalg.det(J).min()>0

@pytest.mark.parametrize('size', [(8,9,7),(9,8)])
def test_flips_are_exact_and_only_where_asked(size):
    d = len(size)
    torch.manual_seed(0)
    X,M = (TensorVolume,TensorVolumeMask) if d==3 else (TensorSlice,TensorSliceMask)
    x,y = X(torch.rand(3,2,*size)),M(torch.randint(0,5,(3,*size)))
    for a in range(d):
        xa,ya = SpatialTfm(**NO, flips=(a,), p_flip=1.)((x,y), split_idx=0)
        assert torch.equal(plain(xa), plain(x).flip(a+2)) and torch.equal(plain(ya), plain(y).flip(a+1))
    assert not SpatialTfm(p_flip=1.).draw(5, size)['flip'].any()

@pytest.mark.parametrize('dtype', [torch.uint8,torch.int64,torch.int32])
@pytest.mark.parametrize('size', [(16,14,12),(20,24)])
def test_masks_hold_only_their_own_values(dtype, size):
    d = len(size)
    X,M = (TensorVolume,TensorVolumeMask) if d==3 else (TensorSlice,TensorSliceMask)
    vals = torch.tensor([0,3,7,255])
    y = M(vals[torch.randint(0,4,(4,*size))].to(dtype))
    x = X(torch.rand(4,2,*size))
    for _ in range(3):
        xa,ya = Pipeline(volume_tfms(max_elastic=.3, flips=range(d)), split_idx=0)((x,y))
        assert set(plain(ya).unique().tolist())<=set(vals.tolist()) and ya.dtype==dtype and type(ya) is M and type(
                xa) is X

@pytest.mark.parametrize('dtype', [torch.float32,torch.float64,torch.float16,torch.bfloat16])
def test_image_dtype_kept(dtype):
    x,y = balls(2)
    x = x.to(dtype)
    xa,_ = Pipeline(volume_tfms(p_noise=1., p_blur=1.), split_idx=0)((x,y))
    assert xa.dtype==dtype and torch.isfinite(plain(xa).float()).all()

def test_only_training_split():
    x,y = balls(2)
    for t in volume_tfms(p_contrast=1., p_rotate=1.):
        assert t((x,y), split_idx=1)[0] is x and t((x,y))[0] is x and t((x,y), split_idx=0)[0] is not x

def test_target_image_moves_but_is_not_shaded():
    "Restoration: the clean target moves with the input and keeps its values"
    x,_ = balls(2)
    z = TensorVolume(plain(x).clone())
    s = IntensityTfm(p_contrast=1., p_noise=1.)((x,z), split_idx=0)
    assert s[1] is z and not torch.equal(s[0], x)
    m = SpatialTfm(p_rotate=1.)((x,z), split_idx=0)
    assert torch.equal(m[0], m[1]) and not torch.equal(m[0], x)

def test_batch_without_mask_and_with_category():
    x,_ = balls(2)
    c = TensorCategory(torch.tensor([0,1]))
    t = SpatialTfm(p_rotate=1.)
    assert len(t((x,), split_idx=0))==1
    xa,ca = t((x,c), split_idx=0)
    assert ca is c and not torch.equal(xa,x)

@pytest.mark.parametrize('shift,scale', [(0.,1.),(300.,1000.)])
def test_strengths_follow_the_item(shift, scale):
    "Contrast, brightness, gamma and noise mean the same after any linear normalisation"
    torch.manual_seed(0)
    x = TensorVolume(torch.rand(3,2,10,10,10))
    t = IntensityTfm(max_bias=.5, p_bias=1., p_contrast=1., p_brightness=1., p_gamma=1., p_noise=1., p_blur=1.,
                     p_low_res=1.)
    p = t.draw(3, (10,10,10))
    a = plain(t.apply(x, p))
    b = plain(t.apply(TensorVolume(plain(x)*scale+shift), p))
    torch.testing.assert_close((b-shift)/scale, a, atol=2e-3, rtol=0)

def test_values_of_each_change():
    x = TensorSlice(torch.rand(2,1,40,40))
    t = IntensityTfm(**QUIET)
    p = t.draw(2, (40,40))
    one = torch.ones(2)
    go = lambda **k: plain(t.apply(x, {**p, **k}))
    v = plain(x)
    m = v.mean((2,3), keepdim=True)
    s = v.std((2,3), correction=0, keepdim=True)
    torch.testing.assert_close(go(contrast=one*1.2), (v-m)*1.2+m)
    torch.testing.assert_close(go(brightness=one*.5), v+.5*s)
    g = go(gamma=one*2)
    torch.testing.assert_close([g.amin(),g.amax()], [v.amin(),v.amax()])
    torch.testing.assert_close((go(noise=one*.1)-v).std((2,3), keepdim=True), .1*s, rtol=.1, atol=0)
    want = ndi.gaussian_filter(v[0,0].numpy().astype('float64'), 1., mode='nearest', truncate=3)
    np.testing.assert_allclose(go(blur=one)[0,0].numpy(), want, atol=1e-5)
    torch.testing.assert_close(go(low_res=one*2)[:,:,1:-1:2,1:-1:2].mean(), torch.nn.functional.avg_pool2d(v,2).mean(),
                               atol=.02, rtol=0)
    torch.testing.assert_close(along_axes(v, [low_res_matrix(40,1.)]*2), v)

def test_constant_image_stays_finite():
    x = TensorVolume(torch.full((2,1,8,8,8), 3.))
    out = IntensityTfm(max_bias=.3, p_bias=1., p_contrast=1., p_gamma=1., p_noise=1., p_blur=1.)(  (x,), split_idx=0)[0]
    torch.testing.assert_close(plain(out), plain(x))

def test_thin_and_tiny_patches():
    for size in ((16,16,1),(2,3,2)):
        x,y = TensorVolume(torch.rand(2,1,*size)),TensorVolumeMask(torch.zeros(2,*size,dtype=torch.uint8))
        xa,ya = Pipeline(volume_tfms(max_elastic=.3, max_bias=.3, p_blur=1., p_low_res=1.), split_idx=0)((x,y))
        assert xa.shape==x.shape and ya.shape==y.shape and torch.isfinite(plain(xa)).all()

def test_refusals():
    x,y = balls(2)
    b = (x,y)
    for kw,word in ((dict(max_elastic=.6),'max_elastic'),(dict(max_scale=1.),'max_scale'),(dict(p_noise=2.),'p_noise'),
            (dict(max_low_res=.5),'max_low_res'),(dict(spacing=(1,0,1)),'spacing'),(dict(max_rotate=-1.),'max_rotate')):
        with pytest.raises(ValueError, match=word): volume_tfms(**kw)
    with pytest.raises(TypeError): volume_tfms(max_rotation=5)
    with pytest.raises(ValueError, match='spacing of 3'): SpatialTfm((1,1))(b, split_idx=0)
    with pytest.raises(ValueError, match='flips'): SpatialTfm(flips=(3,))(b, split_idx=0)
    with pytest.raises(ValueError, match='max_rotate'): SpatialTfm(max_rotate=(5.,5.))(b, split_idx=0)
    with pytest.raises(ValueError, match='one size'):
        SpatialTfm()((x, TensorVolumeMask(plain(y)[...,:-1])), split_idx=0)
    with pytest.raises(TypeError, match='TensorVolume'): SpatialTfm()((plain(x),plain(y)), split_idx=0)

def test_pickle_and_repr():
    for t in volume_tfms(spacing=(1,1,2), max_rotate=(5.,0.,15.)):
        u = pickle.loads(pickle.dumps(t))
        assert repr(u)==repr(t) and 'spacing=(1.0, 1.0, 2.0)' in repr(t) and u.split_idx==0

def test_xtra_tfms_are_kept():
    t = SpatialTfm()
    assert volume_tfms(xtra_tfms=[t])[-1] is t

# --- TorchIO

def item(spacing=(1.,1.,1.)):
    x,y = balls(1)
    x,y = TensorVolume(plain(x)[0]),TensorVolumeMask(plain(y)[0])
    x.affine = y.affine = np.diag([*spacing,1.])
    y.codes = ['background','ball']
    return x,y

def test_torchio_moves_image_and_mask_alike():
    import torchio as tio
    for sp in ((1.,1.,1.),(1.,1.,2.)):
        x,y = item(sp)
        torch.manual_seed(0)
        xa,ya = TorchIOTransform(tio.RandomAffine(degrees=20, scales=.2, default_pad_value=0))((x,y), split_idx=0)
        assert type(xa) is TensorVolume and type(ya) is TensorVolumeMask and ya.dtype==torch.uint8 and ya.codes==y.codes
        assert not torch.equal(xa, x) and dice(plain(xa)[0]>.5,
                                               plain(ya)>0)>.95 and set(plain(ya).unique().tolist())<={0,1}
        np.testing.assert_allclose(xa.affine, x.affine)

def test_torchio_gives_the_new_affine():
    import torchio as tio
    x,y = item()
    xa,ya = TorchIOTransform(tio.Resample(2), split_idx=None)((x,y))
    assert xa.spacing==ya.spacing==(2.,2.,2.) and xa.shape[1:]==ya.shape==(12,14,10) and x.spacing==(1.,1.,1.)
    np.testing.assert_allclose(xa.affine, ya.affine)

def test_torchio_on_slices_training_only_and_refusals():
    import torchio as tio
    x,y = balls(1, (48,40))
    x,y = TensorSlice(plain(x)[0]),TensorSliceMask(plain(y)[0].long())
    torch.manual_seed(0)
    t = TorchIOTransform(tio.RandomAffine(degrees=20, default_pad_value=0))
    xa,ya = t((x,y), split_idx=0)
    assert type(xa) is TensorSlice and type(
            ya) is TensorSliceMask and xa.shape==x.shape and ya.dtype==torch.int64 and dice(plain(xa)[0]>.5,
            plain(ya)>0)>.95
    assert t((x,y), split_idx=1)[0] is x
    n = TorchIOTransform(tio.RandomNoise(std=1.))
    xb,yb = n((x,y), split_idx=0)
    assert torch.equal(yb,y) and not torch.equal(xb,x)
    with pytest.raises(TypeError, match='torchio'): TorchIOTransform(lambda o: o)
    with pytest.raises(ValueError, match='differ in shape'): t((x, TensorSliceMask(plain(y)[:-1])), split_idx=0)
    pickle.loads(pickle.dumps(t))
