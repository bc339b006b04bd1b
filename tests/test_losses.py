"Losses: parity with MONAI, gradients, one channel, ignored voxels, what fastai asks."
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmed.learn.losses import *

torch.set_num_threads(1)
ALL = [DiceLoss, DiceCELoss, TverskyLoss, FocalLoss]
SHAPES = [(3,4,7,6,5),(2,3,9,8),(2,1,6,5,4)]

def data(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype)*2, torch.randint(0, max(shape[1],2), (shape[0],*shape[2:]),
            generator=g)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('batch', [False,True])
@pytest.mark.parametrize('smooth', [1.,1e-5])
def test_monai_dice(shape, batch, smooth):
    from monai.losses import DiceCELoss as DC
    from monai.losses import DiceLoss as M
    from monai.losses import TverskyLoss as T
    x,t = data(shape)
    one = shape[1]==1
    kw = dict(include_background=one, softmax=not one, sigmoid=one, to_onehot_y=not one, smooth_nr=smooth,
              smooth_dr=smooth, batch=batch)
    torch.testing.assert_close(DiceLoss(smooth=smooth, batch=batch)(x, t), M(**kw)(x, t[:,None]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(TverskyLoss(.3, .7, smooth=smooth, batch=batch)(x, t),
                               T(alpha=.3, beta=.7, **kw)(x, t[:,None]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(DiceCELoss(dice=.5, ce=2, smooth=smooth, batch=batch)(x, t),
                               DC(lambda_dice=.5, lambda_ce=2, **kw)(x, t[:,None].float() if one else t[:,None]),
                               atol=1e-5, rtol=1e-5)
    if not one:
        torch.testing.assert_close(DiceLoss(smooth=smooth, batch=batch, include_background=True)(x, t),
                                   M(**kw|dict(include_background=True))(x, t[:,None]), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('gamma', [0.,1.,2.,3.5])
def test_monai_focal(shape, gamma):
    from monai.losses import FocalLoss as M
    x,t = data(shape)
    C = shape[1]
    # a mean over classes too: zero for all but one
    theirs = M(gamma=gamma, use_softmax=C>1, to_onehot_y=C>1)(x, t[:,None].float())
    torch.testing.assert_close(FocalLoss(gamma)(x, t), theirs*C, atol=1e-5, rtol=1e-5)

def test_torch_cross_entropy():
    x,t = data((1,4,6,7))
    w = torch.tensor([.1,1,2,3])
    torch.testing.assert_close(DiceCELoss(dice=0, weight=w)(x, t), F.cross_entropy(x, t, w))
    torch.testing.assert_close(FocalLoss(0., weight=w)(x, t), F.cross_entropy(x, t, w))
    t[:,:3] = 9
    torch.testing.assert_close(DiceCELoss(dice=0, weight=w, ignore_index=9)(x, t),
                               F.cross_entropy(x, t, w, ignore_index=9))
    x,t = data((2,1,5,6))
    torch.testing.assert_close(DiceCELoss(dice=0)(x, t), F.binary_cross_entropy_with_logits(x[:,0], t.float()))

def test_dice_weight():
    x,t = data((2,3,6,6))
    w = [5.,1.,3.]
    per = [DiceLoss(weight=[0,*o])(x, t) for o in ((1.,0.),(0.,1.))]
    torch.testing.assert_close(DiceLoss(weight=w)(x, t), (per[0]+3*per[1])/4)

@pytest.mark.parametrize('loss', [DiceLoss(), DiceLoss(batch=True, weight=[1,2,3]),
                         DiceCELoss(ignore_index=2, weight=[1,2,3]), TverskyLoss(), FocalLoss(2.),
                         FocalLoss(.5, ignore_index=1)])
def test_gradcheck(loss):
    x,t = data((2,3,3,4), torch.float64)
    assert torch.autograd.gradcheck(lambda o: loss(o, t), x.requires_grad_())

def test_gradcheck_sigmoid():
    x,t = data((2,1,3,4), torch.float64)
    for l in (DiceCELoss(), FocalLoss(), TverskyLoss()):
        assert torch.autograd.gradcheck(lambda o: l(o, t), x.clone().requires_grad_())

def sure(t, C): return F.one_hot(t, C).movedim(-1, 1)*60.-30 if C>1 else t[:,None]*60.-30

@pytest.mark.parametrize('cls', ALL)
@pytest.mark.parametrize('C', [1,2,4])
def test_perfect_is_zero(cls, C):
    "Row 9 of the silent failures: one channel and a sigmoid too."
    t = data((2,C,6,5,4))[1]
    assert cls()(sure(t, C), t)<1e-5
    assert cls()(sure(t*0, C), t*0)<1e-5, 'absent and not predicted'
    wrong = (t+1)%max(C,2)
    assert cls()(sure(wrong, C), t)>.5

@pytest.mark.parametrize('cls', ALL)
def test_none_is_per_item(cls):
    for shape in SHAPES:
        x,t = data(shape)
        f = cls(reduction='none')
        per = f(x, t)
        assert per.shape==(shape[0],)
        torch.testing.assert_close(per, torch.stack([cls()(x[i:i+1], t[i:i+1]) for i in range(len(x))]))
        f.reduction = 'mean'
        torch.testing.assert_close(f(x, t), per.mean())

@pytest.mark.parametrize('cls', ALL)
def test_ignored_voxels(cls):
    x,t = data((2,3,6,6))
    t[:,2:4] = 255
    f = cls(ignore_index=255)
    y = x.clone()
    y[:,:,2:4] = 50*torch.randn(2,3,2,6)
    torch.testing.assert_close(f(x, t), f(y, t))
    x.requires_grad_()
    f(x, t).backward()
    assert (x.grad[:,:,2:4]==0).all() and x.grad[:,:,:2].abs().sum()>0
    cut = [0,1,4,5]
    torch.testing.assert_close(f(x, t), cls()(x[:,:,cut], t[:,cut]))
    x.grad = None
    loss = f(x, torch.full_like(t, 255))
    loss.backward()
    assert loss==0 and (x.grad==0).all()

@pytest.mark.parametrize('cls', ALL)
@pytest.mark.parametrize('dtype', [torch.uint8,torch.int16,torch.int64])
def test_dtypes(cls, dtype):
    x,t = data((2,3,6,6))
    f = cls()
    assert f(x, t.to(dtype))==f(x, t) and f(x, t).dtype==torch.float32
    for d in (torch.bfloat16,torch.float16):
        assert f(x.to(d), t)==f(x.to(d).float(), t) and f(x.to(d), t).dtype==torch.float32
    with torch.autocast('cpu', dtype=torch.bfloat16): assert f(x, t).dtype==torch.float32 and f(x, t)==cls()(x, t)
    x,t = data((2,1,6,6))
    assert f(x, t.bool())==f(x, t.to(dtype))

@pytest.mark.parametrize('cls', ALL)
def test_layout_and_types(cls):
    from fastai.torch_core import TensorImageBase, TensorMask
    class Vol(TensorImageBase): pass
    class VolMask(TensorImageBase): pass
    x,t = data((2,3,4,5,6))
    f = cls()
    torch.testing.assert_close(f(x.to(memory_format=torch.channels_last_3d), t), f(x, t))
    for a in (Vol, TensorMask):
        for b in (VolMask, TensorMask):
            out = f(a(x), b(t))
            assert type(out) is Tensor and out==f(x, t)
    g = Vol(x.clone()).requires_grad_()
    f(g, VolMask(t)).backward()
    assert g.grad is not None

@pytest.mark.parametrize('cls', ALL)
def test_refusals(cls):
    x,t = data((2,3,6,6))
    f = cls()
    with pytest.raises(TypeError, match='DeepSupervisionLoss'): f([x,x], t)
    with pytest.raises(ValueError, match=r'\(2, 3, 6, 6\).*found \(2, 5, 6\)'): f(x, t[:,:5])
    with pytest.raises(ValueError, match='must be'): f(x, t[:,None])
    with pytest.raises(TypeError, match='float32'): f(x, t.float())
    with pytest.raises(ValueError, match='255.*expected 0 to 2'): f(x, t.masked_fill(t==2, 255))
    with pytest.raises(ValueError, match='expected 0 to 2'): f(x, t-1)
    with pytest.raises(ValueError, match='expected 0 to 1'): f(x[:,:1], t.clamp_max(1)*255)
    with pytest.raises(ValueError, match='2 class weights for 3'): cls(weight=[1,2])(x, t)
    with pytest.raises(ValueError, match='reduction'): cls(reduction='sum')
    with pytest.raises(ValueError, match='weight'): cls(weight=[1,-1,1])
    with pytest.raises(TypeError): cls(wieght=[1,2,3])

@pytest.mark.parametrize('cls', ALL)
@pytest.mark.parametrize('C', [1,3])
def test_activation_decodes(cls, C):
    x,_ = data((2,C,4,5,6))
    f = cls()
    p = f.activation(x)
    assert 0<=p.min() and p.max()<=1 and p.shape==x.shape
    if C>1: torch.testing.assert_close(p.sum(1), torch.ones(2,4,5,6))
    d = f.decodes(p)
    assert d.shape==(2,4,5,6) and d.dtype==torch.int64
    assert torch.equal(d, (x[:,0]>0).long() if C==1 else x.argmax(1))
    assert pickle.loads(pickle.dumps(f)).activation(x).equal(p) and repr(f).startswith(cls.__name__)

@pytest.mark.parametrize('cls', ALL)
@pytest.mark.parametrize('C', [1,3])
def test_in_a_learner(cls, C):
    "What fastai does with a loss: fit, validate, get_preds with losses and decoded, Interpretation's per-item losses."
    from fastai.vision.all import DataLoader, DataLoaders, Learner
    items = [(torch.randn(1,8,8), torch.randint(0, max(C,2), (8,8))) for _ in range(5)]
    dls = DataLoaders(DataLoader(items, bs=2), DataLoader(items, bs=2))
    learn = Learner(dls, nn.Conv2d(1, C, 3, padding=1), loss_func=cls(weight=[1.]*max(C,2)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        probs,targs,dec,losses = learn.get_preds(with_decoded=True, with_loss=True)
        mean = learn.validate()[0]
    assert probs.shape==(5,C,8,8) and dec.shape==targs.shape==(5,8,8) and losses.shape==(5,)
    assert abs(losses.mean()-mean)<1e-5 and learn.loss_func.reduction=='mean'

def test_training_finds_a_small_structure():
    "A structure of 1 % of the voxels is learnt: Dice + cross-entropy, plain SGD on one image."
    torch.manual_seed(0)
    t = torch.zeros(1,20,20, dtype=torch.long)
    t[:,4:6,4:6] = 1
    img = t[:,None].float()+.2*torch.randn(1,1,20,20)
    m,f = nn.Sequential(nn.Conv2d(1,8,3,padding=1), nn.ReLU(), nn.Conv2d(8,2,1)),DiceCELoss()
    opt = torch.optim.Adam(m.parameters(), .03)
    for _ in range(80):
        opt.zero_grad()
        f(m(img), t).backward()
        opt.step()
    p = f.decodes(f.activation(m(img)))
    assert 2*(p*t).sum()/(p.sum()+t.sum())>.8

@pytest.mark.parametrize('shape', [(2,3,4,5), (2,3,4,5,6), (2,3)])
def test_label_smoothing_of_a_plain_learner_decides_along_the_classes(shape):
    "fastai's took the last axis, which in a mask is a place"
    from fastai.losses import LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat

    import fastmed.all  # noqa: F401
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for loss in (LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropyFlat(axis=1)):
        assert torch.equal(loss.activation(x), x.softmax(1)) and torch.equal(loss.decodes(x), x.argmax(1))
    assert torch.equal(LabelSmoothingCrossEntropyFlat().decodes(x), x.argmax(-1))
