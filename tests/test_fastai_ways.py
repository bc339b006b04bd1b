"""What fastai's users type: `learn.tta` with fastai's arguments, `splitter=`, a compiled network, networks without a
convolution, other DataLoaders."""
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import Edge, Nearest, affine_of, write_case
from PIL import Image
from torch import nn

from fastmed.all import *
from fastmed.core import ArgumentError
from fastmed.models.zoo import param_splitter
from fastmed.predict.tta import mix_views

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    path = tmp_path_factory.mktemp('cases')
    return path,pd.DataFrame([dict(write_case(path, f'c{i}', affine_of('RAS'), (16,16,16), seed=i), kind='ab'[i%2])
                                   for i in range(4)])

def volumes(cases, **kw):
    return VolumeDataLoaders.from_df(cases[1], cases[0], **{'patch':(16,16,16), 'bs':2, 'cache':cases[0]/'cache',
                                                            'batch_tfms':None, **QUIET, **kw})
def slices(cases, **kw):
    return SliceDataLoaders.from_df(cases[1], cases[0], **{'patch':(16,16), 'axis':2, 'bs':2, 'cache':cases[0]/'cache',
                                                           'batch_tfms':None, **QUIET, **kw})

# ---- learn.tta

@pytest.fixture(scope='module')
def learn(cases):
    learn = VolumeLearner(volumes(cases), Edge(1, 3), loss_func=DiceCELoss(), path=cases[0])
    learn.recorder.silent = True
    return learn

def views(learn, tta, which):
    with learn.no_bar(), learn.no_logging():
        return [learn.tta(tta=TTA(flips=()) if False else tta, n=k, beta=None)[0] for k in which]

def test_tta_takes_all_that_fastai_takes():
    ours,fastais = inspect.signature(VolumeLearner.tta).parameters,inspect.signature(Learner.tta).parameters
    assert list(ours)[:len(fastais)]==list(fastais)

def test_tta_is_mixed_as_fastai_does(learn):
    with learn.no_bar(), learn.no_logging():
        (one,plain),t = learn.tta(1, None, 1, tta=(0,1), beta=None)
        (three,_),_ = learn.tta(n=3, tta=(0,1), beta=None)
        assert torch.allclose(plain, learn.get_preds()[0], atol=1e-6) and not torch.allclose(one, plain,
                atol=1e-2) and not torch.allclose(three, one, atol=1e-2)
        assert torch.allclose(learn.tta(n=3, tta=(0,1), beta=.25)[0], torch.lerp(three, plain, .25), atol=1e-6)
        assert torch.allclose(learn.tta(tta=(0,1))[0], (three*3+plain)/4,
                              atol=1e-6) and torch.allclose(learn.tta(tta=(0,1), beta=1.)[0], plain, atol=1e-6)
        assert torch.allclose(learn.tta(n=1, tta=(0,1), use_max=True)[0], torch.maximum(one, plain), atol=1e-6)
        assert (learn.tta(tta=('flips','rotate'), use_max=True)[0]>=plain-1e-6).all()
        p = learn.tta(tta='rotate', beta=0.)[0]
        assert torch.isfinite(p).all()
    assert t.shape==plain.shape[:1]+plain.shape[2:]

@pytest.mark.parametrize('kw,match', [(dict(n=4, tta=(0,)), 'n from 1 to 1'), (dict(n=0, tta=(0,)), 'n from'),
        (dict(n=True, tta=(0,)), 'n from'), (dict(beta=2., tta=(0,)), 'beta'), (dict(beta='x', tta=(0,)), 'beta'),
                                      (dict(item_tfms=[FlipItem()]), 'item_tfms'),
        (dict(batch_tfms=aug_transforms()), 'batch_tfms'),
                                      (dict(with_loss=True), 'with_loss cannot be mixed'),
        (dict(with_input=True), 'with_input'), (dict(with_decoded=True), 'with_decoded')])
def test_tta_refuses_what_it_cannot_use(learn, kw, match):
    with pytest.raises((InputError,ArgumentError), match=match), learn.no_bar(), learn.no_logging(): learn.tta(**kw)

def test_what_no_other_look_saw_is_the_plain_prediction():
    plain,other,seen = torch.tensor([1.,2,3]),torch.tensor([9.,0,0]),torch.tensor([1.,0,.5])
    assert torch.equal(mix_views(plain, [(other,seen)], beta=0.),
                       torch.tensor([9.,2,0])) and torch.equal(mix_views(plain, [(other,seen)], use_max=True),
                                                               torch.tensor([9.,2,3]))

def test_tta_of_a_classifier_takes_them_too(cases):
    learn = classifier_learner(volumes(cases, mask_col=None, label_col='kind', patch='auto', size=16,
                               batch_tfms=[SpatialTfm()]), 'small_resnet', nf=4)
    with learn.no_bar(), learn.no_logging():
        (aug,plain),_ = learn.tta(n=3, beta=None)
        p = learn.tta(n=3)[0]
        assert torch.allclose(p, (2*aug+plain)/3, atol=1e-6) and torch.allclose(learn.tta(n=3, beta=.25)[0],
                torch.lerp(aug, plain, .25), atol=1e-6)
        with pytest.raises(ArgumentError, match='item_tfms'): learn.tta(item_tfms=[FlipItem()])

def test_every_look_sees_the_same_patches_of_training(cases):
    "Random patches, turned at random: a network that looks at single voxels answers as without looks"
    learn = VolumeLearner(volumes(cases, patch=(8,8,8), batch_tfms='auto'), Nearest(1, 3), loss_func=DiceCELoss(),
                                  path=cases[0])
    with learn.no_bar(), learn.no_logging():
        for dl in (learn.dls.train, learn.dls.train.new(shuffle=False, drop_last=False, random=True)):
            def seen(f, seed=0):
                set_seed(seed)
                dl.rng.seed(0)
                return f(dl=dl)
            (p,t),(q,u) = seen(learn.get_preds),seen(partial(learn.tta, tta=(0,1)))
            assert torch.equal(t, u) and torch.allclose(p, q, atol=1e-5)
            drawn = dl is not learn.dls.train                    # of these fastai takes a copy, to look at
            assert torch.equal(t, seen(learn.get_preds, 1)[1])!=drawn

def test_tta_of_a_classifier_refuses_what_it_cannot_mix(cases):
    learn = classifier_learner(volumes(cases, mask_col=None, label_col='kind', patch='auto', size=16), 'small_resnet',
                               nf=4)
    for k in ('with_loss','with_input','with_decoded'):
        with pytest.raises(ArgumentError, match=f'{k} cannot be mixed'), learn.no_bar(), learn.no_logging():
            learn.tta(n=2, **{k:True})

def test_tta_of_a_loaded_learner_asks_for_data(learn):
    learn.export('no_data.pkl')
    with pytest.raises(InputError, match='test_dl'): load_learner(learn.path/'no_data.pkl').tta()

# ---- networks without a convolution

class Mixer(nn.Module):
    "A layer of each voxel alone"
    def __init__(self, n_in, n_out):
        super().__init__()
        self.a = nn.Linear(n_in, n_out)
    def forward(self, x): return self.a(x.movedim(1,-1)).movedim(-1,1)

class OneSize(Mixer):
    "One that has a weight for each voxel of its patch, as transformers have"
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.place = nn.Parameter(torch.zeros(1,1,16,16,16))
    def forward(self, x): return super().forward(x+self.place)

@pytest.mark.parametrize('make,factory', [(volumes,unet3d_learner), (slices,unet2d_learner)])
def test_a_network_without_a_convolution_learns_and_predicts(cases, make, factory):
    learn = factory(make(cases), Mixer, path=cases[0])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    fn = cases[0]/cases[1].image[0]
    assert learn.predict_volume(fn).shape==(16,16,16) and learn.predict_volume(fn, tta=(0,)).shape==(16,16,
            16) and len(learn.evaluate())==2*len(learn.dls.valid_ds)

def test_a_learner_made_by_hand_predicts_without_a_convolution(cases):
    learn = VolumeLearner(slices(cases, context=1), Mixer(3, 3), loss_func=DiceCELoss(), path=cases[0])
    assert learn.predict_volume(cases[0]/cases[1].image[0]).shape==(16,16,16)

def test_a_network_of_one_size_takes_the_patch(cases):
    learn = unet3d_learner(volumes(cases), OneSize, path=cases[0])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.predict_volume(cases[0]/cases[1].image[0]).shape==(16,16,16)

# ---- splitter=

def halves(m):
    ps = params(m)
    return [ps[:1],ps[1:]]

def test_factories_take_a_splitter(cases):
    for learn in (unet3d_learner(volumes(cases), nf=4, depth=2, splitter=halves),
                  unet2d_learner(slices(cases), nf=4, depth=2, splitter=halves),
                  restoration_learner(volumes(cases), nf=4, depth=2, splitter=halves),
                  classifier_learner(volumes(cases, mask_col=None, label_col='kind', patch='auto', size=16),
                                     'small_resnet', nf=4, splitter=halves)):
        assert learn.splitter is halves
        learn.create_opt()
        assert [len(o) for o in learn.opt.param_lists]==[1,len(params(learn.model))-1]
    assert unet3d_learner(volumes(cases), nf=4, depth=2).splitter is param_splitter

# ---- save_model of a compiled network

@pytest.mark.parametrize('in_place', [False,True])
def test_a_compiled_network_is_saved(cases, tmp_path, in_place):
    learn = unet3d_learner(volumes(cases), nf=4, depth=2, path=tmp_path)
    fn = cases[0]/cases[1].image[0]
    want = learn.predict_volume(fn, proba=True)[1]
    if in_place: learn.model.compile(backend='eager')
    else: learn.model = torch.compile(learn.model, backend='eager')
    save_model(learn, tmp_path/'m.safetensors')
    assert torch.equal(load_model(tmp_path/'m.safetensors', device='cpu').predict_volume(fn, proba=True)[1], want)
    # the Learner's own stays compiled
    assert in_place==(getattr(learn.model, '_compiled_call_impl', None) is not None)

# ---- plot_volume

def test_the_slider_is_a_widget_that_prints_nothing():
    w = pytest.importorskip('ipywidgets')
    drawn = plot_volume(TensorVolume(torch.randn(1,6,5,4)), slider=True)
    assert isinstance(drawn, w.Widget) and drawn.f(index=2) is None and drawn.children[0].max==3

def test_a_compiled_classifier_is_saved(cases, tmp_path):
    learn = classifier_learner(volumes(cases, mask_col=None, label_col='kind', patch='auto', size=16), 'small_resnet',
                               nf=4)
    want = learn.case_prediction(cases[0]/cases[1].image[0])
    learn.model = torch.compile(learn.model, backend='eager')
    save_model(learn, tmp_path/'m.safetensors')
    loaded = load_model(tmp_path/'m.safetensors', device='cpu')
    assert torch.allclose(loaded.case_prediction(cases[0]/cases[1].image[0]), want, atol=1e-6)

# ---- learn.dls = other

def test_other_dataloaders_bring_their_names(cases):
    learn = unet3d_learner(volumes(cases, codes=['background','large','small']), nf=4, depth=2, path=cases[0])
    learn.dls = volumes(cases, codes=['background','liver','spleen'])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=DiceCallback())
    names = list(learn.recorder.metric_names)
    assert [n for n in names if 'liver' in n or 'spleen' in n]==['dice_liver','dice_spleen','case_dice_liver',
            'case_dice_spleen'] and not any('large' in n for n in names)
    assert list(learn.evaluate().structure.unique())==['liver',
            'spleen'] and list(learn.predict_volume(cases[0]/cases[1].image[0]).codes)==['background','liver','spleen']
    with pytest.raises(InputError, match='made for 3 codes'):
        learn.dls = volumes(cases, codes={'background':0, 'any':[1,2]})
    learn.export(cases[0]/'m.pkl')
    assert load_learner(cases[0]/'m.pkl').predict_volume(cases[0]/cases[1].image[0]).codes[1]=='liver'

def test_weights_of_a_compiled_network_are_those_of_a_plain_one(cases):
    a,b,c = [unet3d_learner(volumes(cases), nf=4, depth=2, path=cases[0]) for _ in range(3)]
    a.model,c.model = torch.compile(a.model, backend='eager'),torch.compile(c.model, backend='eager')
    a.save('compiled')
    for l in (b,c):
        l.load('compiled')
        assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), l.model.parameters()))
    assert type(c.model) is type(a.model), 'it stays compiled'

# ---- pictures

def test_pictures_are_laid_out_as_fastai_does(cases):
    for dls in (volumes(cases), slices(cases), volumes(cases, mask_col=None, label_col='kind', patch='auto', size=16)):
        for show in (dls.show_batch, dls.valid.show_batch):
            show(nrows=2, ncols=1, figsize=(3,5))
            fig = plt.gcf()
            assert len(fig.axes)==2 and tuple(fig.get_size_inches())==(3,
                    5) and fig.axes[0].get_subplotspec().get_gridspec().get_geometry()==(2,1)
    for learn in (unet3d_learner(volumes(cases), nf=4, depth=2), classifier_learner(dls, 'small_resnet', nf=4)):
        with learn.no_bar(), learn.no_logging():
            learn.show_results(ds_idx=0, figsize=(4,4), max_n=1)
            assert tuple(plt.gcf().get_size_inches())==(4,4)
            Interpretation.from_learner(learn).plot_top_losses(1, nrows=1, figsize=(2,2))
            assert tuple(plt.gcf().get_size_inches())==(2,2)

@pytest.mark.parametrize('item', [None, 3, np.zeros((8,8)), Image.new('L', (8,8))],
        ids=['none','number','array','picture'])
def test_what_is_no_file_of_a_radiograph_is_refused(item):
    with pytest.raises(ArgumentError, match="expected a picture's file"): load_radiograph(item)
