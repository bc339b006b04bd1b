"Callbacks and evaluation, where a fit is cut short, interrupted, or a case fails."
import copy
import pickle
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.all import (
    Callback,
    CancelStepException,
    EarlyStoppingCallback,
    GradientAccumulation,
    ReduceLROnPlateau,
)
from phantoms import CODES, write_case

from fastmed.all import (
    BudgetCallback,
    CostCallback,
    DiceCallback,
    InputError,
    TensorVolumeMask,
    VolumeDataLoaders,
    load_mask,
    save_volume,
    scan_folder,
    set_seed,
    summarise,
    unet3d_learner,
)


def learner_of(path, samples_per_case):
    rows = [write_case(path, f'c{i}', np.eye(4), (16,16,16), i) for i in range(6)]
    dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), path, codes=CODES, patch=16, bs=1,
                                    samples_per_case=samples_per_case, cache=path/'s', device='cpu', batch_tfms=None)
    return unet3d_learner(dls, nf=4, depth=2)

@pytest.fixture
def learn(tmp_path): return learner_of(tmp_path, 8)

def test_a_cut_epoch_keeps_its_columns(learn):
    "The training loss of the epoch that the clock cut short is logged, so no column moves"
    with learn.no_bar(), learn.no_logging(): learn.fit_for(1/60)
    rows = learn.recorder.values
    assert {len(r) for r in rows}=={len(learn.recorder.metric_names)-2}
    assert learn.recorder.lrs[-1]<max(learn.recorder.lrs)

class Stop(Callback):
    def after_validate(self): raise KeyboardInterrupt

def test_an_interrupted_fit_leaves_no_columns(learn):
    learn.add_cb(DiceCallback())
    n = len(learn.metrics)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
        learn.fit(1)
        names = list(learn.recorder.metric_names)
        assert len(names)==len(set(names)) and len(learn.metrics)==n
        learn.get_preds()

def test_the_last_epoch_of_a_time_budget_gets_its_look(learn):
    learn.add_cb(DiceCallback(every=1000))
    with learn.no_bar(), learn.no_logging(): learn.fit_for(1/60)
    assert len(learn.dice.cases)

def test_augmented_looks_see_the_same_patches(learn):
    with learn.no_bar():
        a,ta = learn.tta(ds_idx=0, tta=())
        b,tb = learn.tta(ds_idx=0, tta=())
    assert (ta==tb).all() and torch.allclose(a, b)

@pytest.mark.parametrize('values', [(-1,0,1000), (0,255), (0,256), (-5,3), (0,70000)])
def test_a_mask_is_stored_without_loss(values, tmp_path):
    m = TensorVolumeMask(torch.tensor(values, dtype=torch.int32).view(-1,1,1), affine=np.eye(4))
    assert load_mask(save_volume(m, tmp_path/'m.nii.gz')).flatten().tolist()==list(values)

def test_numbered_scans_are_no_channels(tmp_path):
    for n in ('ann_0000','ann_0001','bob_0001','bob_0002'): (tmp_path/f'{n}.nii.gz').touch()
    assert scan_folder(tmp_path, '*.nii.gz', masks=None).case.tolist()==['ann','bob_0001','bob_0002']

def test_the_line_of_all_counts_cases():
    rows = [dict(case=c, structure=s, dice=d, hd95=1., nsd=1., status=st) for c in 'xy' for s,d,
            st in (('a',0.,'missed'),('b',0.,'missed'),('c',np.nan,'empty'))]
    s = summarise(rows)
    assert s.loc['all',['n','failed','empty']].tolist()==[2,2,0] and s.loc['a','failed']==2

def test_writing_into_an_item_does_not_reach_the_store(learn):
    dl = learn.dls.valid
    before = dl.do_item(0)[0].clone()
    dl.do_item(0)[0].zero_()
    assert (dl.do_item(0)[0]==before).all()

def test_a_thin_patch_tells_the_axis(tmp_path):
    "A patch with one side of 1 says which way it is cut; another axis beside it is refused"
    from fastmed.all import SliceDataLoaders
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', np.eye(4), (16,20,12), i) for i in range(4)])
    kw = dict(codes=CODES, cache=tmp_path/'s', device='cpu')
    assert SliceDataLoaders.from_df(df, tmp_path, patch=(16,1,8), **kw).plan.axis==1
    with pytest.raises(ValueError, match='axis=0 was given'):
        SliceDataLoaders.from_df(df, tmp_path, patch=(16,1,8), axis=0, **kw)

def test_an_interrupted_look_is_not_shown_by_later_fits(learn):
    "A `DiceCallback` given to the fit: no column of it stays, and a new one has its columns once"
    n = len(learn.metrics)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[DiceCallback(), Stop()])
        learn.fit(1)
        assert not [o for o in learn.recorder.metric_names if o.startswith('case_')] and len(learn.metrics)==n
        learn.fit(1, cbs=DiceCallback())
        names = list(learn.recorder.metric_names)
        assert names.count('case_dice')==1 and len(learn.recorder.values[0])==len(names)-2
        with pytest.raises(ValueError, match='case_dice_large.*remove_cb'):
            learn.fit(1, cbs=[DiceCallback(), DiceCallback()])

class Waits(Callback):
    "What a tracker has waited, after each epoch"
    order = 70
    def __init__(self, of): self.of,self.seen = of,[]
    def after_epoch(self): self.seen.append(self.of.wait)

def test_epochs_without_a_look_are_not_without_improvement(tmp_path):
    """Of six epochs the second, fourth and sixth are looked at; with patience 2 the fit ends after two looks that were
    no better, not before"""
    learn = learner_of(tmp_path, 1)
    for patience,every,epochs in ((2,2,6),(1,3,6),(0,2,4)):
        early = EarlyStoppingCallback('case_dice', patience=patience)
        w = Waits(early)
        with learn.no_bar(), learn.no_logging():
            learn.fit(9, lr=0., wd=0., cbs=[DiceCallback(every=every, n=1), early, w])
        at = list(learn.recorder.metric_names[1:]).index('case_dice')
        assert [np.isnan(v[at]) for v in learn.recorder.values]==[(i+1)%every>0 for i in range(epochs)]
    slow = ReduceLROnPlateau('case_dice', patience=1)
    with learn.no_bar(), learn.no_logging(): learn.fit(5, lr=1e-30, wd=0., cbs=[DiceCallback(every=2, n=1), slow])
    assert learn.opt.hypers[-1]['lr']==pytest.approx(1e-32, abs=0), 'after the looks of epochs 4 and 5, not of 1 and 3'

class Steps(Callback):
    "Steps of the optimiser, by its own state"
    def before_fit(self): self.n,self.last = 0,None
    def after_batch(self):
        now = [p.detach().clone() for p in self.learn.model.parameters()]
        if self.training and self.last is not None: self.n += any(not torch.equal(a, b) for a,b in zip(now, self.last))
        self.last = now

def test_an_update_is_a_step_that_happened(learn):
    "Batches whose gradients are collected are no updates: neither of the budget nor of the cost"
    learn.add_cb(CostCallback())
    steps = Steps()
    with learn.no_bar(), learn.no_logging():
        learn.fit(99, 1e-2, cbs=[BudgetCallback(updates=5), GradientAccumulation(4), steps])
    assert learn.cost.total['updates']==5==steps.n and len(learn.recorder.losses)==20
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert learn.cost.total['updates']==len(learn.dls.train)

class Over(Callback):
    "As mixed precision does where gradients overflow"
    def before_step(self):
        if self.iter%2: raise CancelStepException()

def test_a_step_that_was_passed_over_is_no_update(learn):
    learn.add_cb(CostCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Over())
    assert learn.cost.total['updates']==(len(learn.dls.train)+1)//2

@pytest.mark.parametrize('where', ['learner','call'])
def test_lr_find_with_a_budget(learn, where):
    "The rates and losses are those without a budget, and what training cost is kept"
    cbs = [BudgetCallback(updates=3), CostCallback()]
    rates = lambda: (list(learn.recorder.lrs), [float(o) for o in learn.recorder.losses])
    if where=='learner': learn.add_cbs(cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-9, cbs=cbs if where=='call' else None)
    def find():
        set_seed(1)
        for dl in learn.dls.loaders: dl.rng.seed(1)
        with learn.no_bar(): learn.lr_find(num_it=9, show_plot=False)
        return rates()
    if where=='learner': got = find()
    else:
        with learn.added_cbs(cbs): got = find()
    assert learn.cost.total['updates']==3 if where=='learner' else True
    with learn.removed_cbs(cbs) if where=='learner' else nullcontext(): assert find()==got and len(got[0])>=9

def test_validation_costs_no_training(learn):
    "Neither `validate` nor `get_preds` empties the cost of the last fit, or stumbles over a budget"
    learn.add_cbs([BudgetCallback(updates=3), CostCallback()])
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.fit(1)
        was = learn.cost.total
        learn.validate()
        learn.get_preds()
    assert learn.cost.total==was and was['updates']==3

def test_a_learner_that_the_clock_stopped_goes_into_a_pickle(learn):
    "fastai leaves the iterator of an epoch that was cut short, and that cannot be pickled or copied"
    with learn.no_bar(), learn.no_logging(): learn.fit(9, cbs=BudgetCallback(updates=3))
    other = pickle.loads(pickle.dumps(learn))
    assert all(torch.equal(a, b) for a,b in zip(learn.model.state_dict().values(), other.model.state_dict().values()))
    copy.deepcopy(learn.dls)

@pytest.mark.parametrize('kw', [dict(minutes='2'), dict(updates=[3]), dict(voxels=0)])
def test_a_budget_that_is_none_is_refused(kw):
    with pytest.raises(InputError, match='expected a number of more than 0'): BudgetCallback(**kw)

def test_two_budgets_are_refused(learn):
    "The schedule follows one, and the other would end the fit before the rate has come down"
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(InputError, match='one budget.*remove_cb'):
            learn.fit(9, cbs=[BudgetCallback(updates=3), BudgetCallback(minutes=1)])
        learn.add_cb(BudgetCallback(updates=3))
        with pytest.raises(InputError, match='3 updates'): learn.fit_for(.01)
        learn.fit(1)
        learn.remove_cb(BudgetCallback)
        learn.fit_for(1/60)
