"Training that is no longer of numbers stops, says where, and nothing that is not finite is ever saved."
import re
import warnings
from pathlib import Path

import pytest
import torch
from fastai.callback.all import Callback, SaveModelCallback, TerminateOnNaNCallback
from fastai.data.all import Transform
from phantoms import CODES

from fastmed.all import (
    Comparison,
    InputError,
    ResumeCallback,
    SliceDataLoaders,
    TensorVolume,
    VolumeDataLoaders,
    classifier_learner,
    load_learner,
    save_encoder,
    save_model,
    set_seed,
    unet2d_learner,
    unet3d_learner,
)


class Poison(Transform):
    "The patches of some cases are NaN"
    order = 50
    def __init__(self, *cases): self.cases = cases
    def encodes(self, x:TensorVolume):
        bad = any(f'/{c}.' in str((x.meta or {}).get('fn')) for c in self.cases)
        return x*float('nan') if bad else x

def make(study, tmp, ndim=3, poison=(), **kwargs):
    set_seed(3, reproducible=True)
    path,df = study
    own = dict(codes=CODES, spacing=1.25, patch=16, bs=2, samples_per_case=2, num_workers=0, device='cpu',
               batch_tfms=None, cache=Path(tmp)/'s')
    if poison: own['item_tfms'] = Poison(*poison)
    dls = (VolumeDataLoaders if ndim==3 else SliceDataLoaders).from_df(df, path, **{**own, **kwargs})
    return (unet3d_learner if ndim==3 else unet2d_learner)(dls, nf=4, depth=2, path=Path(tmp), fast=False)

def train(learn, epochs=2, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, lr, **kwargs)

def copied(learn): return [p.detach().clone() for p in learn.model.parameters()]
def finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())

class At(Callback):
    "Do something in one batch of training"
    def __init__(self, epoch, batch, event, do):
        self.at,self.do = (epoch,batch),do
        setattr(self, event, self.act)
    def act(self):
        if self.training and (self.epoch,self.iter)==self.at: self.do(self.learn)

def nan_gradient(learn): next(p for p in learn.model.parameters() if p.grad is not None).grad.fill_(float('nan'))
def nan_loss(learn): learn.loss_grad = learn.loss_grad*float('nan')
def nan_weight(learn): next(learn.model.parameters()).data.view(-1)[0] = float('nan')

@pytest.mark.parametrize('workers', [0, 2])
def test_the_case_is_named(study, tmp_path, workers):
    """Of a batch of two the one whose scan is NaN; epoch and batch are those in which it came; the weights are those of
    before"""
    learn = make(study, tmp_path, num_workers=workers)
    case = str(learn.dls.train_ds.items['case'].iloc[3])
    learn = make(study, tmp_path, poison=[case], num_workers=workers)
    seen = []
    class Watch(Callback):
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.iter, not self.xb[0].isfinite().all(), copied(self.learn)))
    with pytest.raises(InputError) as e: train(learn, cbs=Watch())
    epoch,batch,bad,weights = seen[-1]
    assert bad and not any(o[2] for o in seen[:-1])
    said = str(e.value)
    assert (f'epoch {epoch}, batch {batch} (both counted from 0), case {case}: the loss is nan' in said
            and 'Lower the rate (' in said and 'check_dataset' in said)
    assert 'Exception occured' not in said and all(torch.equal(a, b) for a,b in zip(weights, learn.model.parameters()))

def test_slices_and_classifiers_too(study, tmp_path):
    with pytest.raises(InputError,
                       match=r'epoch 0, batch 1 \(both counted from 0\), (case|one of the cases) c\d.*the loss is nan'):
        train(make(study, tmp_path, 2), cbs=At(0, 1, 'after_loss', nan_loss))
    df = study[1].assign(kind=[o%2 for o in range(len(study[1]))])
    dls = VolumeDataLoaders.from_df(df, study[0], label_col='kind', spacing=2.5, bs=2, num_workers=0, device='cpu',
                                    cache=tmp_path/'s')
    learn = classifier_learner(dls, 'small_resnet', path=tmp_path)
    with pytest.raises(InputError, match='epoch 0, batch 0.*the loss is nan'):
        train(learn, cbs=At(0, 0, 'after_loss', nan_loss))

def test_a_loss_that_is_nan_on_purpose(study, tmp_path):
    learn = make(study, tmp_path)
    learn.loss_func = torch.nn.CrossEntropyLoss(weight=torch.zeros(3))                       # 0/0
    was = copied(learn)
    with pytest.raises(InputError, match='batch 0.*one of the cases'): train(learn)
    assert all(torch.equal(a, b) for a,b in zip(was, learn.model.parameters()))

def test_an_update_that_spoils_the_weights(study, tmp_path):
    """A finite loss with a gradient that is not: named is the batch of the update, at the next batch or at the end of
    the epoch"""
    with pytest.raises(InputError, match=r'epoch 0, batch 1 \(.*its update left weights'):
        train(make(study, tmp_path), cbs=At(0, 1, 'before_step', nan_gradient))
    learn = make(study, tmp_path)
    last = len(learn.dls.train)-1
    class Never(Callback):
        def before_validate(self): pytest.fail('the epoch went on')
    with pytest.raises(InputError, match=rf'epoch 0, batch {last} \(.*its update left weights'):
        train(learn, 1, cbs=[At(0, last, 'before_step', nan_gradient), Never()])
    with pytest.raises(InputError, match='batch 0.*were not finite before'): train(learn)

def test_lr_find_goes_on_to_its_end(study, tmp_path):
    "It diverges on purpose; the weights are then what they were"
    learn = make(study, tmp_path)
    was = copied(learn)
    with learn.no_bar(): learn.lr_find(1e-3, 1e30, num_it=20, stop_div=False, show_plot=False, suggest_funcs=None)
    losses = torch.tensor([float(o) for o in learn.recorder.losses])
    assert len(losses)==20 and not losses.isfinite().all(), 'it did not diverge'
    assert all(torch.equal(a, b) for a,b in zip(was, learn.model.parameters()))
    train(learn, 1)

def test_steps_that_mixed_precision_passes_over(study, tmp_path):
    "An infinite gradient under a GradScaler is no reason to stop"
    # as fastai's MixedPrecision, which needs a GPU
    class Scaler(Callback):
        order,passed = 10,0
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu')
        def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self):
            self.skipped = True
            self.scaler.step(self)
            if self.skipped:
                self.passed += 1
                from fastai.callback.core import CancelStepException
                raise CancelStepException()
        def after_step(self): self.learn.scaler.update()
        @property
        def param_groups(self): return self.opt.param_groups
        def step(self, *args, **kwargs): self.skipped = False
    learn = make(study, tmp_path)
    learn.remove_cb(learn.gradient_clip)
    scaler,ran_over = Scaler(),At(0, 1, 'before_step',
            lambda l: next(p for p in l.model.parameters() if p.grad is not None).grad.fill_(float('inf')))
    ran_over.order = 5
    train(learn, 1, cbs=[scaler, ResumeCallback('r.pth', 1), ran_over])
    assert scaler.passed==1 and finite(learn)

def test_terminate_on_nan_ends_quietly(study, tmp_path):
    "fastai's callback asks for an end without an error: it ends there, before anything is learnt, and says the same"
    learn = make(study, tmp_path)
    with pytest.warns(UserWarning, match='epoch 1, batch 0.*the loss is nan'):
        train(learn, 3, cbs=[TerminateOnNaNCallback(), SaveModelCallback(at_end=True), ResumeCallback('r.pth'),
                At(1, 0, 'after_loss', nan_loss)])
    assert finite(learn) and len(learn.recorder.values)==1 and (tmp_path/'models'/'model.pth').exists()
    assert (tmp_path/'r.pth').exists(), 'the last good state'

@pytest.mark.parametrize('every', [None, 1])
def test_the_last_good_state_stays(study, tmp_path, every):
    """`ResumeCallback` writes no state of a network that diverged; the same call with the cause mended ends as one that
    never met it"""
    whole = make(study, tmp_path/'a')
    train(whole, cbs=ResumeCallback('r.pth', every))
    learn = make(study, tmp_path/'b')
    with pytest.raises(InputError, match='batch 1'):
        train(learn, cbs=[ResumeCallback('r.pth', every), At(1, 1, 'before_step', nan_gradient)])
    again = make(study, tmp_path/'b')
    train(again, cbs=ResumeCallback('r.pth', every))
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))

def test_nothing_that_is_not_finite_is_saved(study, tmp_path):
    "What was saved before stays as it was"
    learn = make(study, tmp_path)
    train(learn, 1)
    writes = {learn.save('m'):lambda: learn.save('m'), tmp_path/'m.pkl':lambda: learn.export('m.pkl'),
            tmp_path/'m.safetensors':lambda: save_model(learn, tmp_path/'m.safetensors'),
              tmp_path/'e.safetensors':lambda: save_encoder(learn.model, tmp_path/'e.safetensors')}
    for f in writes.values(): f()
    was = {fn:fn.read_bytes() for fn in writes}
    nan_weight(learn)
    for fn,f in writes.items():
        with pytest.raises(InputError, match=rf'{re.escape(fn.name)}: not written, because of NaN'): f()
        assert fn.read_bytes()==was[fn]
    assert learn.dls.train_ds and learn.opt is not None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert finite(load_learner(tmp_path/'m.pkl'))

def test_the_averages_of_the_optimizer_too(study, tmp_path):
    learn = make(study, tmp_path)
    train(learn, 1)
    next(s for s in learn.opt.state.values() if 'sqr_avg' in s)['sqr_avg'].view(-1)[0] = float('inf')
    with pytest.raises(InputError, match='averages'): learn.save('m')
    assert learn.save('m', with_opt=False).exists()

def test_a_mask_of_attention_may_hold_infinity(study, tmp_path):
    learn = make(study, tmp_path)
    learn.model.register_buffer('mask', torch.tensor([0., float('-inf')]))
    assert learn.save('m').exists()

def test_save_model_callback(study, tmp_path):
    learn = make(study, tmp_path)
    class Spoil(Callback):
        order = 55
        def after_validate(self):
            if self.epoch: nan_weight(self.learn)
    with pytest.raises(InputError, match='model_1.pth: not written'):
        train(learn, 2, cbs=[SaveModelCallback(every_epoch=True), Spoil()])
    assert [o.name for o in (tmp_path/'models').iterdir()]==['model_0.pth']

def test_a_study_names_the_run(study, tmp_path):
    "Runs that are done stay, the one that diverged is named with its case"
    path,df = study
    df = df.assign(**{k:[str(path/o) for o in df[k]] for k in ('image','mask')})
    arms = dict(good=dict(ndim=3), high=dict(ndim=3, lr_max=1e30))
    comp = Comparison(df, arms, codes=CODES, folds=2, budget=dict(updates=12), path=tmp_path/'c', spacing=1.25,
                      patch=16, bs=2, nf=4, depth=2, cache=tmp_path/'s', num_workers=0, device='cpu')
    with pytest.raises(InputError, match=r"run 'high, fold \d.*epoch \d+, batch \d+.*case"): comp.run()
    assert comp.plan[comp.plan.arm=='good'].done.any() and not comp.plan[comp.plan.arm=='high'].done.any()

class PoisonBatch(Callback):
    "One batch of training is NaN or infinite"
    order = -1
    def __init__(self, epoch, batch, value=float('nan')): self.at,self.value = (epoch,batch),value
    def before_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: self.learn.xb = (torch.full_like(self.xb[0], self.value),)

@pytest.mark.parametrize('batch,value', [(0, float('nan')), (1, float('inf'))])
def test_batch_norms_learn_nothing_from_a_batch_that_is_no_number(study, tmp_path, batch, value):
    "Their running averages are changed on the way forward: they are put back, and the batch itself is named"
    df = study[1].assign(kind=[o%2 for o in range(len(study[1]))])
    dls = VolumeDataLoaders.from_df(df, study[0], label_col='kind', spacing=2.5, bs=2, num_workers=0, device='cpu',
                                    cache=tmp_path/'s')
    for ends in ([], [TerminateOnNaNCallback()]):
        set_seed(3, reproducible=True)
        learn,seen = classifier_learner(dls, 'resnet18', path=tmp_path),[]
        class Watch(Callback):
            order = -2
            def before_batch(self):
                if self.training: seen.append({k:v.clone() for k,v in self.model.state_dict().items()})
        cbs = [PoisonBatch(0, batch, value), Watch(), *ends]
        says = rf'epoch 0, batch {batch} \(both counted from 0\), .*: the loss is nan'
        with (pytest.warns(UserWarning, match=says) if ends else pytest.raises(InputError, match=says)):
            train(learn, cbs=cbs)
        assert len(seen)==batch+1
        assert all(torch.equal(v, seen[-1][k]) for k,v in learn.model.state_dict().items())
