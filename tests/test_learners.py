"""Learners and DataLoaders that a fastai user builds by hand: what fastai offers works, or is refused by name before
training."""
import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import lr_find  # noqa: F401
from fastai.data.all import CategoryBlock, ColReader, DataBlock, Datasets, IndexSplitter, RegressionBlock, TfmdDL
from fastai.interpret import Interpretation
from fastai.learner import Callback, Learner, load_learner
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    DiceLoss,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from phantoms import CODES, write_case
from PIL import Image
from torch import nn

from fastmed.core import InputError
from fastmed.data.blocks import CaseFiles, PatchDL, VolumeBlock, VolumeMaskBlock
from fastmed.data.labels import GroupSplitter
from fastmed.data.loaders import SliceDataLoaders, VolumeDataLoaders
from fastmed.data.radiographs import RadiographBlock, RadiographPrep
from fastmed.data.recipe import whole_plan
from fastmed.data.transforms import PatchTransform, WholeTransform
from fastmed.learn.callbacks import DiceCallback, PictureCallback, TensorBoardVolumes
from fastmed.learn.classify import classifier_learner, regression_learner
from fastmed.learn.learner import make_fast, unet2d_learner, unet3d_learner
from fastmed.learn.losses import MultiTaskLoss, as_loss
from fastmed.learn.pretrain import restoration_learner
from fastmed.models.zoo import create_model, model_names, param_splitter
from fastmed.predict.tta import mix_views


@pytest.fixture
def cases(tmp_path):
    "Six phantoms of three subjects: (folder, DataFrame)"
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(6)])
    return tmp_path, df.assign(subject=[f's{i//2}' for i in range(6)], label=['a','b']*3)

def mask_block(path, splitter=None, patch=(8,8,8)):
    return DataBlock((VolumeBlock, VolumeMaskBlock(CODES)), get_x=CaseFiles('image', path),
            get_y=CaseFiles('mask', path),
                     splitter=splitter or IndexSplitter([4,5]), item_tfms=PatchTransform(patch))

def warned(f, word):
    "What `f` gives, and its warnings that hold a word"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f()
    return res,[str(o.message) for o in w if word in str(o.message)]

# Weighted and partial DataLoaders

def check_patches(dls, n):
    "What every DataLoader of patches keeps"
    assert isinstance(dls.train, PatchDL) and isinstance(dls.valid, PatchDL)
    assert dls.train.n==n and dls.train.samples==2
    x,y = dls.one_batch()
    assert x.affine is None and y.affine is None, 'a batch has no place'
    a,b = [torch.cat([o[0] for o in dls.valid]) for _ in range(2)]
    assert len(a)==4 and torch.equal(a, b), 'validation patches stay where they are'

def test_weighted_dataloaders_keep_patches(cases):
    path,df = cases
    dls = mask_block(path).weighted_dataloaders(df, [1,0,0,3,1,1], bs=2, samples=2, num_workers=0)
    check_patches(dls, 8)
    drawn = [int(i)%4 for _ in range(40) for i in dls.train.get_idxs()]
    assert set(drawn)=={0,3} and .15<np.mean(np.array(drawn)==0)<.35, 'cases are drawn by their weights'
    torch.manual_seed(0)
    patches = torch.cat([o[0] for o in dls.train]).flatten(1)
    assert len(patches.unique(dim=0))==len(patches), 'a case that is drawn twice gives two patches'
    one = dls.train.new(shuffle=False, drop_last=False)
    assert [i%4 for i in one.get_idxs()]==[0,1,2,3]*2, 'in order, every case is there'
    with pytest.raises(InputError, match='4 training cases.*3'): dls.train.new(wgts=[1,2,3])

def test_partial_dataloaders_keep_patches(cases):
    path,df = cases
    dls = mask_block(path).datasets(df).partial_dataloaders(partial_n=3, bs=1, samples=2, num_workers=0)
    check_patches(dls, 8)
    assert len(dls.train)==3 and len(list(dls.train))==3

def test_weighted_dataloaders_of_ready_dls(cases, cache):
    path,df = cases
    dls = VolumeDataLoaders.from_df(df, path, codes=CODES, patch=(8,8,8), bs=2, samples_per_case=2, cache=cache,
                                    num_workers=0)
    n = len(dls.train_ds)
    w = dls.weighted_dataloaders([1]+[0]*(n-1))
    assert isinstance(w, VolumeDataLoaders) and w.valid is dls.valid and w.plan==dls.plan
    assert {i%n for i in w.train.get_idxs()}=={0} and w.one_batch()[0].shape==dls.one_batch()[0].shape
    assert len(dls.partial_dataloaders(2).train)==1
    with pytest.raises(InputError, match='training cases'): dls.weighted_dataloaders([1.])

def test_weights_on_one_side_of_a_split_are_refused():
    "Ready DataLoaders of radiographs ended in an IndexError of pandas"
    dls = Datasets(list(range(8)), [[lambda o: o]], splits=[[0,1,2,3],[4,5,6,7]]).dataloaders(bs=2)
    with pytest.raises(InputError, match='one side of a split'): dls.weighted_dataloaders([1,1,1,1])
    with pytest.raises(InputError, match='one side of a split'): dls.partial_dataloaders(2)

def test_weighted_dataloaders_of_others_stay_fastais():
    dls = Datasets(list(range(8)), [[lambda o: o]], splits=[[0,1,2,3],[4,5,6,7]]).weighted_dataloaders([1,1,1,1], bs=2)
    assert type(dls.train) is WeightedDL

def test_patches_without_patchdl_are_refused(cases):
    path,df = cases
    with pytest.raises(InputError, match='PatchDL.*TfmdDL'):
        mask_block(path).datasets(df).dataloaders(dl_type=TfmdDL, bs=2, after_item=[PatchTransform((8,8,8))])

# A split by hand

def test_random_splitter_that_parts_a_subject_warns(cases):
    path,df = cases
    _,said = warned(lambda: mask_block(path, IndexSplitter([1,2])).datasets(df), 'both sides')
    assert len(said)==1 and "'s0'" in said[0] and 'GroupSplitter' in said[0]
    _,said = warned(lambda: mask_block(path, GroupSplitter(df.subject)).datasets(df), 'both sides')
    assert not said
    _,said = warned(lambda: mask_block(path, IndexSplitter([1,2])).datasets(df.drop(columns='subject')), 'both sides')
    assert not said

def test_a_split_of_radiographs_that_parts_a_subject_warns(tmp_path):
    for i in range(4):
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16,16)+np.uint8(i)).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(file=[str(tmp_path/f'{i}.png') for i in range(4)], label=['a','b']*2,
            subject=['s0','s0','s1','s1']))
    def block(splitter):
        return DataBlock((RadiographBlock(RadiographPrep(16)), CategoryBlock), get_x=ColReader('file'),
                get_y=ColReader('label'), splitter=splitter)
    _,said = warned(lambda: block(IndexSplitter([1,2])).dataloaders(df, bs=2, num_workers=0), 'both sides')
    assert len(said)==1 and "'s0'" in said[0] and 'GroupSplitter' in said[0]
    _,said = warned(lambda: block(IndexSplitter([2,3])).dataloaders(df, bs=2, num_workers=0), 'both sides')
    assert not said

# Freezing

@pytest.mark.parametrize('ndim', [2,3])
@pytest.mark.parametrize('name', [n for n in model_names() if n not in ('AttentionUnet','HighResNet','monai.UNet')])
def test_freeze_leaves_the_decoder_and_no_more(name, ndim):
    if ndim==2 and name in ('DenseVoxelNet','unet_cicek'): pytest.skip('a network for volumes')
    model = create_model(name, 1, 2, ndim=ndim, patch=(32,)*ndim)
    enc,rest = param_splitter(model)
    share = sum(p.numel() for p in enc)/sum(p.numel() for p in model.parameters())
    tensors = len(enc)+len(rest)
    assert .3<share<.99 and .25<len(enc)/tensors<.95, f'{name}: {len(enc)} tensors of {tensors} are the encoder'

def patch_learner(cases, arch='UNet', **kwargs):
    path,df = cases
    dls = mask_block(path).dataloaders(df, path=path, bs=2, num_workers=0)
    return unet3d_learner(dls, arch, **{**({'nf':4, 'depth':2} if arch=='UNet' else {}), **kwargs})

class Frozen(Callback):
    "Whether the encoder stands still, an epoch a row"
    def __init__(self): self.rows = []
    def before_train(self):
        self.rows.append(not any(p.requires_grad for p in self.opt.all_params(slice(0,1)).itemgot(0)))

def test_fine_tune_after_load_freezes_first(cases):
    learn,again = patch_learner(cases),patch_learner(cases)
    with learn.no_bar(), learn.no_logging(), again.no_bar(), again.no_logging():
        learn.fine_tune(1, cbs=(look:=Frozen()))
        assert look.rows==[False], 'from random weights no epoch is spent on a frozen encoder'
        learn.lr_find(num_it=12, show_plot=False)
        assert not learn.loaded, 'lr_find puts back what was there'
        again.load(learn.save('one').stem).fine_tune(1, cbs=(look:=Frozen()))
    assert look.rows==[True, False]

@pytest.mark.parametrize('name', ['AttentionUnet','HighResNet','monai.UNet'])
def test_freeze_without_an_encoder_says_so(cases, name):
    learn = patch_learner(cases, name)
    _,said = warned(learn.freeze, 'freeze')
    assert len(said)==1 and name.split('.')[-1] in said[0] and 'splitter' in said[0]

def test_fine_tune_of_an_exported_learner_freezes_first(cases):
    learn = patch_learner(cases)
    assert not pickle.loads(pickle.dumps(learn)).loaded, 'never trained'
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export()
    again = load_learner(learn.path/'export.pkl')
    again.dls = learn.dls
    with again.no_bar(), again.no_logging(): again.fine_tune(1, cbs=(look:=Frozen()))
    assert look.rows==[True, False]

# Losses of torch's and fastai's

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()

def slices(cases, cache, **kwargs):
    path,df = cases
    dls = SliceDataLoaders.from_df(df, path, codes=CODES, patch=(16,16,1), bs=4, cache=cache, num_workers=0)
    return unet2d_learner(dls, nf=4, depth=2, path=path, **kwargs)

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy, nn.CrossEntropyLoss(weight=torch.ones(3)),
        CrossEntropyLossFlat(axis=1)], ids=['module','function','weight','flat'])
def test_a_loss_of_torchs_on_masks_trains_predicts_and_shows(cases, loss):
    learn = patch_learner(cases, loss_func=loss)
    quiet(learn, lambda: learn.fit(1, cbs=PictureCallback(n=1)))
    p,t,dec,losses = quiet(learn, lambda: learn.get_preds(with_decoded=True, with_loss=True))
    assert torch.allclose(p.sum(1), torch.ones(len(p),8,8,8),
                          atol=1e-3) and dec.shape==t.shape and losses.shape==(len(p),)
    assert float(losses.mean())==pytest.approx(float(F.nll_loss(p.log(), t.long())), rel=1e-3)
    quiet(learn, learn.show_results)
    again = load_learner(learn.export() or learn.path/'export.pkl')
    assert set(np.unique(again.predict_volume(cases[0]/cases[1].image[0])))<={0,1,2}

@pytest.mark.parametrize('size', [(6,6,6),(5,5)])
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat(axis=1),
        FocalLossFlat(axis=1, gamma=0.)], ids=['module','function','flat','focal'])
def test_fastais_flat_losses_do_not_swap_the_axes_of_a_mask(loss, size):
    torch.manual_seed(0)
    logits,mask = torch.randn(2,3,*size),torch.randint(0,3,(2,*size), dtype=torch.uint8)
    l = as_loss(copy.deepcopy(loss))
    assert float(l(logits, mask))==pytest.approx(float(F.cross_entropy(logits, mask.long())), rel=1e-4)
    l.reduction = 'none'
    assert torch.allclose(l(logits, mask), F.cross_entropy(logits, mask.long(), reduction='none').flatten(1).mean(1),
                                                           atol=1e-5)

@pytest.mark.parametrize('ndim', [2,3])
@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropyFlat(axis=1), DiceLoss()],
        ids=['smooth','flat','dice'])
def test_fastais_losses_decide_along_the_classes_of_a_mask(cases, cache, loss, ndim):
    learn = patch_learner(cases, loss_func=loss) if ndim==3 else slices(cases, cache, loss_func=loss)
    b = learn.dls.valid.one_batch()
    with torch.no_grad(): logits = learn.model.eval()(b[0].as_subclass(torch.Tensor))
    p,_,dec,losses = quiet(learn, lambda: learn.get_preds(dl=[b], with_decoded=True, with_loss=True))
    assert torch.allclose(p, logits.softmax(1), atol=1e-4) and torch.equal(dec,
            logits.argmax(1)) and losses.shape==(len(p),)

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1), FocalLossFlat(axis=1, gamma=0.),
        LabelSmoothingCrossEntropyFlat(axis=1, eps=0.)], ids=['torch','flat','focal','smooth'])
def test_a_plain_learner_of_fastais_learns_the_masks_as_they_lie(cases, loss):
    learn = Learner(mask_block(cases[0]).dataloaders(cases[1], path=cases[0], bs=2, num_workers=0),
            create_model('UNet', 1, 3, nf=4, depth=2), loss_func=loss)
    class Check(Callback):
        "The loss of a batch beside torch's own"
        order,seen = 90,0
        def after_loss(self):
            want = F.cross_entropy(self.pred, self.yb[0].long())
            assert float(self.loss)==pytest.approx(float(want), rel=1e-4)
            self.seen += 1
    check = Check()
    quiet(learn, lambda: learn.fit(1, cbs=check))
    assert check.seen>=3

def test_losses_of_fastais_inside_ones_own_keep_the_axes_of_a_volume():
    torch.manual_seed(0)
    logits,mask = torch.randn(2,3,4,5,6),torch.randint(0,3,(2,4,5,6))
    flat = CrossEntropyLossFlat(axis=1)
    assert float(as_loss(lambda p,t: flat(p, t))(logits, mask))==pytest.approx(float(F.cross_entropy(logits, mask)))
    with pytest.raises(Exception): CrossEntropyLossFlat(axis=1)(logits, mask[:,:3])  # noqa: B017

def test_a_loss_put_in_by_hand_is_made_ready(cases):
    learn = patch_learner(cases)
    learn.loss_func = nn.CrossEntropyLoss()
    quiet(learn, lambda: learn.fit(1))
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(1), atol=1e-3)

def test_a_loss_put_in_by_hand_meets_deep_supervision(cases):
    learn = patch_learner(cases, depth=3, deep_supervision=True)
    learn.loss_func = nn.CrossEntropyLoss()
    quiet(learn, lambda: learn.fit(1))
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(1), atol=1e-3)

def test_a_sigmoid_for_one_structure_takes_torchs_loss():
    logits,mask = torch.randn(2,1,4,4),torch.randint(0,2,(2,4,4), dtype=torch.uint8)
    for loss in (nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat()):
        l = as_loss(loss, 'mask', 1)
        assert float(l(logits, mask))==pytest.approx(float(F.binary_cross_entropy_with_logits(logits[:,0],
                mask.float())))
        assert l.decodes(l.activation(logits)).shape==mask.shape

@pytest.mark.parametrize('task,loss', [('mask',nn.MSELoss()), ('mask',MSELossFlat()), ('mask',F.mse_loss),
        ('mask',nn.NLLLoss()), ('mask',nn.BCEWithLogitsLoss()), ('mask',CrossEntropyLossFlat()),
                                       ('category',nn.MSELoss()), ('category',nn.BCEWithLogitsLoss()),
        ('multi',nn.CrossEntropyLoss()), ('regression',nn.CrossEntropyLoss()), ('regression',nn.BCEWithLogitsLoss())])
def test_a_loss_of_other_targets_is_refused(task, loss):
    with pytest.raises(InputError, match='loss_func: .*Give '): as_loss(loss, task, 3)

def whole(cases, cache, **kwargs):
    path,df = cases
    return VolumeDataLoaders.from_df(df.assign(age=np.arange(6.)), path, codes=CODES if 'mask_col' in kwargs else None,
                                     size=16, bs=2, cache=cache, num_workers=0, **kwargs)

@pytest.mark.parametrize('col,kind,loss',
        [('label','category',nn.CrossEntropyLoss()), ('label','multi',nn.BCEWithLogitsLoss()),
        ('age','regression',nn.MSELoss()), ('age','regression',F.l1_loss)])
def test_a_loss_of_torchs_on_labels_trains_and_predicts(cases, cache, col, kind, loss):
    dls = whole(cases, cache, label_col=col, y_block=kind, label_delim=';' if kind=='multi' else None)
    learn = classifier_learner(dls, 'small_resnet', nf=4, loss_func=loss, path=cases[0])
    quiet(learn, lambda: learn.fit(1))
    p = learn.predict(cases[0]/cases[1].image[0])[2]
    assert p.isfinite().all() and (kind!='category' or float(p.sum())==pytest.approx(1, abs=1e-3)) and (kind!='multi'
            or (0<=p).all() and (p<=1).all())
    assert (quiet(learn, learn.evaluate).status=='ok').all()

def test_numbers_in_a_row_meet_predictions_in_a_column():
    p,t = torch.tensor([[0.],[2.]]),torch.tensor([0.,2.])
    assert as_loss(nn.MSELoss(), 'regression')(p, t)==0, 'of pairs it would be 2'

# Mixed items

def test_mixup_mixes_the_loss_of_each_item_of_masks(cases, cache):
    for learn in (patch_learner(cases), patch_learner(cases, loss_func=nn.CrossEntropyLoss()),
                  patch_learner(cases, loss_func=CrossEntropyLossFlat(axis=1)), slices(cases, cache),
                  patch_learner(cases, depth=3, deep_supervision=True)):
        class Check(Callback):
            "The loss of a mixed batch beside that worked out by hand"
            order,seen = 90,0
            def after_loss(self):
                if not self.training: return
                m,loss = self.mix_up,self.mix_up.old_lf
                old,loss.reduction = loss.reduction,'none'
                one,two = loss(self.pred, *m.yb1),loss(self.pred, *self.yb)
                loss.reduction = old
                assert one.shape==m.lam.shape and float(self.loss)==pytest.approx(
                        float((one*(1-m.lam)+two*m.lam).mean()), rel=1e-4)
                self.seen += 1
        check = Check()
        quiet(learn, lambda: learn.fit(1, cbs=[MixUp(), check]))
        assert check.seen and not isinstance(learn.loss_func, type(learn.fit)) and learn.loss_func.reduction=='mean'

class SameCut(Callback):
    "Each pixel of a mixed batch has the class of the slice that it came from"
    order,seen = 15,0
    def __init__(self, codes): self.codes = codes
    def before_batch(self):
        if not self.training: return
        x,y = self.xb[0],self.yb[0]
        shown = [[int(o) for o in x[:,0].unique()], [int(o) for o in y.unique()]]
        assert len(shown[0])>1, 'two slices meet in a batch'
        assert torch.equal(y,
                           torch.stack([(x[:,0]==v)*c for v,
                                        c in self.codes.items()]).sum(0)), 'the mask of each pixel goes with it'
        self.seen += 1

@pytest.mark.parametrize('loss', [None, nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1)],
        ids=['own','torch','flat'])
def test_cutmix_cuts_the_masks_of_slices_too(cases, cache, loss):
    learn = slices(cases, cache, loss_func=loss)
    marks = {10*i+1:i%3 for i in range(4)}
    class Mark(Callback):
        "Slices of one value each, whose masks are of one class each"
        order = -20
        def before_batch(self):
            v = list(marks)[:len(self.xb[0])]
            for i,k in enumerate(v): self.xb[0][i],self.yb[0][i] = k,marks[k]
    check = SameCut(marks)
    torch.manual_seed(1)
    quiet(learn, lambda: learn.fit(1, cbs=[Mark(), CutMix(), check]))
    assert check.seen and learn.loss_func.reduction=='mean'
    class Plain(Callback):
        "The loss of a batch that was cut is that of its own masks"
        order = 90
        def after_loss(self):
            if self.training:
                assert float(self.loss)==pytest.approx(float(learn.loss_func(self.pred, *self.yb)), rel=1e-4)
    if loss is None: quiet(learn, lambda: learn.fit(1, cbs=[CutMix(), Plain()]))
    quiet(learn, lambda: learn.fit(1, cbs=MixUp()))

def test_what_cannot_be_mixed_is_refused_before_training(cases, cache):
    volumes = patch_learner(cases)
    both = classifier_learner(whole(cases, cache, mask_col='mask', label_col='label'), nf=4, depth=2, path=cases[0])
    single = unet3d_learner(mask_block(cases[0]).dataloaders(cases[1], path=cases[0], bs=1, num_workers=0), nf=4,
                            depth=2)
    restored = restoration_learner(mask_block(cases[0]).dataloaders(cases[1], path=cases[0], bs=2, num_workers=0), nf=4,
                                   depth=2)
    for learn,cb,word in ((volumes,CutMix(),'volumes'), (both,MixUp(),'masks and labels'),
            (both,CutMix(),'masks and labels'), (single,MixUp(),'bs=2'),
                          (restored,MixUp(),'image itself'), (restored,CutMix(),'image itself')):
        was = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(InputError, match=word): quiet(learn, lambda: learn.fit_one_cycle(1, cbs=cb))
        assert all(torch.equal(a, b) for a,
                   b in zip(was, learn.model.parameters())) and 'Mix' not in type(learn.loss_func).__name__

# Masks with labels

def test_masks_with_labels_in_what_fastai_and_fastmed_offer(cases, cache):
    learn = classifier_learner(whole(cases, cache, mask_col='mask', label_col='label'), nf=4, depth=2, path=cases[0])
    quiet(learn, lambda: learn.fit(1, cbs=[DiceCallback(), PictureCallback()]))
    names = learn.recorder.metric_names
    d = dict(zip(names[1:], learn.recorder.values[-1]))
    scored = quiet(learn, learn.evaluate_masks).groupby('structure').dice.mean()
    assert d['case_dice']==pytest.approx(scored.mean(), abs=1e-4) and list((cases[0]/'pictures').glob('*.png'))
    inter = quiet(learn, lambda: Interpretation.from_learner(learn))
    quiet(learn, lambda: inter.plot_top_losses(2))

def test_tta_of_masks_with_labels_is_undone(cases, cache):
    learn = classifier_learner(whole(cases, cache, mask_col='mask', label_col='label'), nf=4, depth=2, path=cases[0])
    (m,l),(tm,tl) = quiet(learn, lambda: learn.tta(n=(0,1)))
    plain,labels = [],[]
    for x,*_ in learn.dls.valid:
        x,learn.model = torch.Tensor(x.as_subclass(torch.Tensor)),learn.model.eval()
        for axes in ([], [2], [3], [2,3]):
            with torch.no_grad(): a,b = learn.model(x.flip(axes) if axes else x)
            plain.append((a.flip(axes) if axes else a).softmax(1))
            labels.append(b.softmax(1))
    assert torch.allclose(m, torch.stack(plain).mean(0), atol=1e-4) and torch.allclose(l, torch.stack(labels).mean(0),
            atol=1e-4)
    assert tm.shape==(2,16,16,16) and tl.shape==(2,)
    with pytest.raises(InputError, match='flips'): learn.tta(n=3)

@pytest.mark.parametrize('beta', ['mean', .25, 0, 1, None])
def test_looks_of_a_mask_and_a_label_are_mixed_each_by_itself(beta):
    torch.manual_seed(0)
    plain,one,two = [(torch.rand(2,3,4,4), torch.rand(2,2)) for _ in range(3)]
    seen = torch.rand(4,4)                                        # of the mask; every look saw all of a label
    mask,label = mix_views(plain, iter([(one,seen), (two,torch.ones(()))]), beta)
    for got,p,a,b,w in ((mask,plain[0],one[0],two[0],seen), (label,plain[1],one[1],two[1],1)):
        others = (a*w+b)/(w+1)
        want = (p+a*w+b)/(2+w) if beta=='mean' else others+(p-others)*(beta or 0)
        if beta is not None: assert torch.allclose(got, want, atol=1e-6)
    if beta is None:
        # as of one prediction: the others, then the plain look
        (om,ol),(pm,pl) = mask,label
        assert torch.allclose(om, (one[0]*seen+two[0])/(1+seen), atol=1e-6) and torch.allclose(ol, (one[1]+two[1])/2)
        assert pm is plain[0] and pl is plain[1]
    m,l = mix_views(plain, [(one,torch.ones(())), (two,torch.ones(()))], use_max=True)
    assert torch.equal(m, torch.stack([plain[0],one[0],two[0]]).amax(0)) and torch.equal(l,
            torch.stack([plain[1],one[1],two[1]]).amax(0))

def test_tta_of_masks_with_labels_takes_fastais_beta_and_use_max(cases, cache):
    learn = classifier_learner(whole(cases, cache, mask_col='mask', label_col='label'), nf=4, depth=2, path=cases[0])
    others,plain = quiet(learn, lambda: learn.tta(n=(0,), beta=None))[0]
    share,most = [quiet(learn, lambda: learn.tta(n=(0,), **k))[0] for k in (dict(beta=.25), dict(use_max=True))]
    for o,p,s,m in zip(others, plain, share, most):
        assert torch.allclose(s, .75*o+.25*p, atol=1e-5) and torch.allclose(m, torch.maximum(o, p), atol=1e-5)

def test_a_plain_mask_loss_inside_a_multi_task_loss(cases, cache):
    dls = whole(cases, cache, mask_col='mask', label_col='label')
    learn = classifier_learner(dls, nf=4, depth=2, path=cases[0],
                               loss_func=MultiTaskLoss(nn.CrossEntropyLoss(), nn.CrossEntropyLoss()))
    quiet(learn, lambda: learn.fit(1))
    assert float(learn.predict(cases[0]/cases[1].image[0])[2].sum())==pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match='MultiTaskLoss'):
        classifier_learner(dls, nf=4, depth=2, loss_func=nn.CrossEntropyLoss())

def test_patches_with_a_label_of_the_case_are_refused(cases):
    path,df = cases
    block = DataBlock((VolumeBlock, CategoryBlock), get_x=CaseFiles('image', path), get_y=ColReader('label'),
            splitter=IndexSplitter([4,5]), item_tfms=PatchTransform((8,8,8)))
    with pytest.raises(InputError, match='cut patches.*label_col'):
        classifier_learner(block.dataloaders(df, bs=2, num_workers=0), 'small_resnet')

# TensorBoard, SegResNetVAE

def test_tensorboard_callback_with_its_defaults(cases, cache, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    both = classifier_learner(whole(cases, cache, mask_col='mask', label_col='label'), nf=4, depth=2, path=cases[0])
    for i,learn in enumerate((patch_learner(cases), slices(cases, cache), both)):
        quiet(learn,
                lambda: learn.fit(1, cbs=[TensorBoardCallback(log_dir=tmp_path/str(i)),
                TensorBoardVolumes(tmp_path/f'v{i}', n=1)]))
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(tmp_path/str(i)))
        events.Reload()
        assert events.Tags()['images']==['Sample results'] and events.Tags()['graph']

@pytest.mark.parametrize('ndim', [2,3])
def test_segresnet_vae_trains_channels_last(ndim):
    model = make_fast(create_model('SegResNetVAE', 1, 2, ndim=ndim, patch=(32,)*ndim, init_filters=8)).train()
    out = model(torch.randn(2, 1, *(32,)*ndim))
    assert out.shape==(2, 2, *(32,)*ndim)
    pickle.loads(pickle.dumps(model))

def test_restoration_compares_images_though_there_are_masks(cases):
    learn = restoration_learner(mask_block(cases[0]).dataloaders(cases[1], path=cases[0], bs=2, num_workers=0), nf=4,
                                depth=2)
    loss = learn.loss_func
    quiet(learn, lambda: learn.fit(1))
    assert learn.loss_func is loss

# What a network is given, and what it answers

def test_two_inputs_are_refused_where_one_is_predicted_from(cases):
    path,df = cases
    im,mask = CaseFiles('image', path),CaseFiles('mask', path)
    def block(blocks, get_x, get_y, item_tfms):
        return DataBlock(blocks, n_inp=2, get_x=get_x, get_y=get_y, splitter=IndexSplitter([4,5]), item_tfms=item_tfms)
    two = block((VolumeBlock, VolumeBlock, VolumeMaskBlock(CODES)), [im,im], mask, PatchTransform((8,8,8)))
    with pytest.raises(InputError, match='n_inp=2.*channels'): unet3d_learner(two.dataloaders(df, bs=2, num_workers=0))
    both = block((VolumeBlock, VolumeMaskBlock(CODES), CategoryBlock), [im,mask], ColReader('label'),
            WholeTransform(whole_plan(df, path=path, size=16)))
    with pytest.raises(InputError, match='n_inp=1'): classifier_learner(both.dataloaders(df, bs=2, num_workers=0))

def test_fastais_regression_block_is_learnt_and_scored(cases):
    path,df = cases
    block = DataBlock((VolumeBlock, RegressionBlock), get_x=CaseFiles('image', path), get_y=ColReader('age'),
            splitter=IndexSplitter([4,5]), item_tfms=WholeTransform(whole_plan(df, path=path, size=16)))
    learn = regression_learner(block.dataloaders(df.assign(age=np.arange(6.)), path=path, bs=2, num_workers=0),
                               'small_resnet', nf=4)
    quiet(learn, lambda: learn.fit(1))
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    p,t = quiet(learn, learn.get_preds)
    assert row['mae']==pytest.approx(float((p.flatten()-t).abs().mean()), abs=1e-3)

def test_dataloaders_of_more_labels_are_refused(cases, cache):
    dls = whole(cases, cache, label_col='label')
    learn = classifier_learner(dls, 'small_resnet', nf=4)
    other = whole((cases[0], cases[1].assign(label=list('abcabc'))), cache, label_col='label')
    with pytest.raises(InputError, match='2 labels.*hold 3'): learn.dls = other
    assert learn.dls is dls
