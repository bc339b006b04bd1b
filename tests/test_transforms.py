"fastai's transforms on our items: they act, image and mask together, or they are refused by name."
import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import affine_of, python, write_case
from PIL import Image

from fastmed.all import *
from fastmed.core import ArgumentError
from fastmed.data.radiographs import RadiographPrep, ShiftTfm

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)
WORK = [Rotate(30, p=1.), Zoom(1.2, 1.5, p=1.), Warp(.4, p=1.), Flip(p=1.), Dihedral(p=1., draw=3), DeterministicFlip(),
        Brightness(.4, p=1.),
        Contrast(.4, p=1.), RandomErasing(p=1., sl=.2), RandomResizedCropGPU(24, min_scale=.3)]
REFUSED_BATCH = [Normalize.from_stats(*imagenet_stats, cuda=False), Normalize(), Saturation(), Hue(), Rotate(size=16),
                 RandomResizedCropGPU(16)]
REFUSED_ITEM = [Resize(24), RandomResizedCrop(24), CropPad(24), RandomCrop(16), RatioResize(24), FlipItem(1.),
                DihedralItem(p=1.), Rotate()]
name = lambda t: type(t).__name__

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp('cases')
    return path,pd.DataFrame([dict(write_case(path, f'c{i}', affine_of('RAS'), (24,24,16), seed=i), kind=i%2)
            for i in range(6)])

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(8): Image.fromarray(rng.integers(1, 255, (30,24), dtype=np.uint8)).save(path/f'{i}.png')
    return path,pd.DataFrame([dict(image=f'{i}.png', label='ab'[i%2]) for i in range(8)])

def slices(cases, **kw):
    return SliceDataLoaders.from_df(cases[1], cases[0], **{'patch':(24,24), 'axis':2, 'bs':4, 'cache':cases[0]/'cache',
                                                           'batch_tfms':None, **QUIET, **kw})
def volumes(cases, **kw):
    return VolumeDataLoaders.from_df(cases[1], cases[0], **{'patch':(16,16,16), 'bs':2, 'cache':cases[0]/'cache',
                                                            'batch_tfms':None, **QUIET, **kw})
def radiographs(pictures, **kw):
    return RadiographDataLoaders.from_df(pictures[1], pictures[0], **{'size':24, 'bs':4, 'cache':pictures[0]/'cache',
            'batch_tfms':None, **QUIET, **kw})

def raw(x): return x.as_subclass(Tensor)

def batch(make, *args, **kw):
    "The same patches of the same cases, whatever the transforms draw; and the DataLoaders"
    set_seed(3)
    dls = make(*args, **kw)
    set_seed(4)
    return dls.train.one_batch(),dls

@pytest.mark.parametrize('t', WORK, ids=name)
def test_what_is_sound_acts_on_slices_with_their_masks(cases, t):
    (x,y),tr = batch(slices, cases, batch_tfms=[t])
    (x0,y0),va = batch(slices, cases)
    assert type(x) is TensorSlice and type(
            y) is TensorSliceMask and x.shape==x0.shape and y.dtype==y0.dtype and not torch.equal(raw(x), raw(x0))
    assert {*y.unique().tolist()}<={*y0.unique().tolist()}
    moves = not isinstance(t, (LightingTfm,RandomErasing))
    assert torch.equal(y, y0)!=moves
    a,b = tr.valid.one_batch(),va.valid.one_batch()
    assert all(torch.allclose(raw(p).float(), raw(q).float(), atol=1e-4) for p,q in zip(a, b))

@pytest.mark.parametrize('context', [0,1])
@pytest.mark.parametrize('t', [o for o in WORK if not isinstance(o, (LightingTfm,RandomErasing,DeterministicFlip))],
                         ids=name)
def test_image_neighbours_and_mask_go_the_same_way(t, context):
    "An image that is its own mask, on a patch that is no square"
    h,w = 24,40
    m = torch.zeros(3, h, w, dtype=torch.uint8)
    m[:,4:12,22:34] = 1
    m[:,14:20,4:16] = 2
    x = TensorSlice(m[:,None].float().repeat(1, 1+2*context, 1, 1))
    if isinstance(t, RandomResizedCropGPU): t = RandomResizedCropGPU((h,w), min_scale=.3, ratio=(1,2))
    a,b = t((x,TensorSliceMask(m)), split_idx=0)
    assert b.dtype==torch.uint8 and not torch.equal(b, m)
    for c in range(a.shape[1]):
        assert ((raw(a)[:,c].round()==raw(b)).float().mean()>.93) and torch.equal(a[:,c], a[:,0])

def test_horizontal_is_as_shown():
    x = torch.arange(24.).view(1,1,4,6)
    # a slice: axis 0 runs from left to right
    assert torch.allclose(raw(Flip(p=1.)((TensorSlice(x),), split_idx=0)[0]), x.flip(-2), atol=1e-4)
    # a radiograph: rows from the top
    assert torch.allclose(raw(Flip(p=1.)((TensorRadiograph(x),), split_idx=0)[0]), x.flip(-1), atol=1e-4)

def test_a_mask_follows_its_radiograph():
    m = torch.zeros(1,8,8).long()
    m[:,1:4,5:8] = 1
    a,b = Flip(p=1.)((TensorRadiograph(m[:,None].float()),TensorSliceMask(m)), split_idx=0)
    assert torch.equal(raw(b), m.flip(-1)) and torch.equal(raw(a)[:,0].round().long(), raw(b))

@pytest.mark.parametrize('t', WORK, ids=name)
def test_what_is_sound_acts_on_radiographs(pictures, t):
    (x,y),_ = batch(radiographs, pictures, batch_tfms=[t])
    (x0,y0),_ = batch(radiographs, pictures)
    assert type(x) is TensorRadiograph and torch.isfinite(x).all() and not torch.equal(raw(x),
            raw(x0)) and torch.equal(y, y0)

def test_aug_transforms_is_what_fastai_does_to_a_picture():
    "The same draw on the same values gives what fastai gives"
    # a range of 0 to 1: nothing to bring there
    x = torch.rand(4,1,16,16)
    x[:,:,0,0],x[:,:,0,1] = 0,1
    for t in (Rotate(30, p=1.), Zoom(1.2, 1.5, p=1.), Warp(.4, p=1.), Flip(), Brightness(.4, p=1.), Contrast(.4, p=1.),
              RandomResizedCropGPU(16)):
        set_seed(1)
        a = t((TensorImage(x.clone()),), split_idx=0)[0]
        set_seed(1)
        b = t((TensorRadiograph(x.clone()),), split_idx=0)[0]
        assert torch.allclose(raw(a), raw(b), atol=1e-5), name(t)

@pytest.mark.parametrize('t', REFUSED_BATCH, ids=name)
def test_batch_transforms_that_are_not_sound_are_refused(cases, pictures, t):
    for make,data in ((slices,cases), (radiographs,pictures)):
        with pytest.raises(ArgumentError, match=name(t)): make(data, batch_tfms=[t]).train.one_batch()

@pytest.mark.parametrize('t', REFUSED_ITEM, ids=name)
def test_item_transforms_that_are_not_sound_are_refused(cases, pictures, t):
    for make,data in ((slices,cases), (radiographs,pictures)):
        with pytest.raises(ArgumentError, match=name(t)): make(data, item_tfms=[t]).train.one_batch()

@pytest.mark.parametrize('t', WORK+REFUSED_BATCH[:-2], ids=name)
def test_volumes_take_no_transform_of_pictures(cases, t):
    with pytest.raises(ArgumentError, match=f"{name(t)}.*(TensorVolume)"): volumes(cases, batch_tfms=[t])
    with pytest.raises(ArgumentError, match='volume_tfms|normalised|grey'): volumes(cases, item_tfms=[t])

def test_resize_and_normalize_say_what_to_write_instead(cases, pictures):
    with pytest.raises(ArgumentError, match='size='): radiographs(pictures, item_tfms=Resize(64))
    with pytest.raises(ArgumentError, match='normalize='):
        slices(cases, batch_tfms=Normalize.from_stats(*imagenet_stats, cuda=False))

def test_a_plain_datablock_is_guarded_too(cases, pictures):
    df,path = cases[1],cases[0]
    get = dict(get_x=CaseFiles('image', path), get_y=CaseFiles('mask', path), splitter=IndexSplitter([0]))
    def block(**kw):
        return DataBlock(blocks=(SliceBlock(), SliceMaskBlock(['background','a','b'])),
                item_tfms=[PatchTransform((24,24,1)), *kw.pop('item', [])], **get, **kw).dataloaders(df, bs=2, **QUIET)
    with pytest.raises(ArgumentError, match='Resize'): block(item=[Resize(24)])
    with pytest.raises(ArgumentError, match='Normalize'):
        block(batch_tfms=[Normalize.from_stats(*imagenet_stats, cuda=False)])
    set_seed(0)
    x,y = block(batch_tfms=aug_transforms()).train.one_batch()
    assert type(x) is TensorSlice and type(y) is TensorSliceMask
    pics = DataBlock(blocks=(RadiographBlock(RadiographPrep(24)), CategoryBlock), get_x=CaseFiles('image', pictures[0]),
            get_y=ColReader('label'), splitter=IndexSplitter([0]))
    with pytest.raises(ArgumentError, match='Resize'):
        pics.new(item_tfms=Resize(24)).dataloaders(pictures[1], bs=2, **QUIET)

def test_transforms_that_come_later_are_guarded(cases):
    dls = slices(cases)
    dls.add_tfms([Normalize.from_stats(*imagenet_stats, cuda=False)], 'after_batch')
    with pytest.raises(ArgumentError, match='Normalize'): dls.train.one_batch()

class OnSlices(Transform):
    def encodes(self, x:TensorSlice): return x+1
class OnLabels(Transform):
    def encodes(self, x:TensorCategory): return x
class Whole(ItemTransform):
    def encodes(self, x): return x[0]*2,x[1]
class MyNormalize(Normalize):
    def encodes(self, x:TensorSlice): return x*3

def test_transforms_of_ones_own_work_as_ever(cases, pictures):
    def add(x:TensorSlice): return x+1
    x0 = batch(slices, cases)[0][0]
    for kw,f in ((dict(batch_tfms=[OnSlices()]), 1), (dict(item_tfms=[OnSlices()]), 1), (dict(batch_tfms=[add]), 1),
                 (dict(batch_tfms=[lambda b: b]), 0)):
        x = batch(slices, cases, **kw)[0][0]
        assert torch.allclose(raw(x), raw(x0)+f, atol=1e-5), kw
    x = batch(slices, cases, item_tfms=[Whole()])[0][0]
    assert torch.allclose(raw(x), raw(x0)*2, atol=1e-5)
    x = batch(slices, cases, batch_tfms=[MyNormalize(0,1)])[0][0]
    assert torch.allclose(raw(x), raw(x0)*3, atol=1e-5)
    radiographs(pictures, batch_tfms=[OnLabels()]).train.one_batch()
    radiographs(pictures, batch_tfms=[IntToFloatTensor()]).train.one_batch()
    with pytest.raises(ArgumentError, match='OnSlices'): volumes(cases, item_tfms=[OnSlices()])
    with pytest.raises(ArgumentError, match='ShiftTfm'): volumes(cases, batch_tfms=[ShiftTfm()])

def test_trained_with_aug_transforms_it_is_kept_and_opened_elsewhere(cases, tmp_path):
    learn = unet2d_learner(slices(cases, batch_tfms=aug_transforms()), nf=4, depth=2, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export(tmp_path/'m.pkl')
    fn = str(cases[0]/cases[1].image[0])
    here = learn.predict_volume(fn)
    code = ("import sys\nfrom fastmed.all import *\nm = "
            "load_learner(sys.argv[-2]).predict_volume(sys.argv[-1])\nprint(int(m.long().sum()), "
            "tuple(m.shape))")
    assert f'{int(here.long().sum())} {tuple(here.shape)}' in python(code, str(tmp_path), str(tmp_path/'m.pkl'), fn)
