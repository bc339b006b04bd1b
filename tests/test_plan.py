"A plan for the minutes that there are: measured once, kept, shared; and what fit_for says before it begins."
import pickle

import numpy as np
import pytest
import torch
from phantoms import CODES

from fastmed.all import *
from fastmed.data import plan as planning
from fastmed.data.plan import UPDATES, update_seconds
from fastmed.learn import pace

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

KW = dict(codes=CODES, valid_pct=.25, spacing=1.25, num_workers=0, device='cpu')
LOADERS = {3:VolumeDataLoaders, 2:SliceDataLoaders}

def machine(gflops, fast=1.):
    "What a machine of so many GFLOP/s measures; its channels-last layout is `fast` times as quick"
    return dict(device='cpu', bf16=False, threads=2,
                seconds={str(nf):dict(fast=1/gflops/fast, plain=1/gflops) for nf in (4,8,16,32)})

@pytest.fixture
def measured(monkeypatch):
    "Every measuring gives one slow machine, and is counted"
    seen = []
    monkeypatch.setattr(planning, 'measure_machine', lambda *args: seen.append(args) or machine(.2))
    return seen

@pytest.mark.parametrize('ndim', (3,2))
def test_without_minutes_the_plan_is_that_of_memory(study, cache, ndim, measured):
    path,df = study
    dls = LOADERS[ndim].from_df(df, path, cache=cache, **KW)
    assert not measured and not {'minutes','updates','fast','machine'} & set(dls.plan)

@pytest.mark.parametrize('ndim', (3,2))
def test_a_slow_machine_gets_a_smaller_plan(study, cache, ndim, measured):
    path,df = study
    big = LOADERS[ndim].from_df(df, path, cache=cache, **KW).plan
    small = LOADERS[ndim].from_df(df, path, cache=cache, minutes=1, **KW).plan
    work = [update_seconds(p, machine(.2)) for p in (big, small)]
    assert len(measured)==1 and work[1]<work[0] and small.minutes==1
    assert all(k in small.reasons for k in ('minutes','updates','fast','machine'))

def test_a_fast_machine_keeps_the_plan_of_memory(study):
    path,df = study
    free = suggest_plan(df, path=path, device='cpu')
    fit = suggest_plan(df, path=path, device='cpu', minutes=2, machine=machine(1e6))
    assert {k:fit[k] for k in free}==dict(free) and fit.updates>=UPDATES

def test_the_layout_is_the_quicker_one(study):
    path,df = study
    plans = [suggest_plan(df, path=path, device='cpu', minutes=2, machine=machine(100, fast)) for fast in (.5,2)]
    assert [p.fast for p in plans]==[False,True]

def test_the_network_follows_the_layout_of_the_plan(study, cache):
    path,df = study
    for fast in (False,True):
        plan = suggest_plan(df, path=path, device='cpu', minutes=2, spacing=1.25, patch=16,
                            machine=machine(100, 2 if fast else .5))
        kw = {k:v for k,v in KW.items() if k!='spacing'}
        learn = unet3d_learner(VolumeDataLoaders.from_df(df, path, cache=cache, plan=plan, **kw), nf=4, depth=2)
        assert bool(learn.model._forward_pre_hooks)==fast
        assert dict(learn.dls.plan)==dict(plan)

def test_a_plan_goes_through_json_and_pickle(study):
    path,df = study
    plan = suggest_plan(df, path=path, device='cpu', minutes=2, machine=machine(5))
    for back in (Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan))):
        assert dict(back)==dict(plan) and back.reasons==plan.reasons

def test_what_a_plan_says_is_not_said_twice(study, cache):
    path,df = study
    plan = suggest_plan(df, path=path, device='cpu')
    def make(cls=VolumeDataLoaders, **k):
        return cls.from_df(df, path, cache=cache, codes=CODES, plan=plan, device='cpu', **k)
    for k,v in dict(patch=16, bs=2, spacing=1.25, samples_per_case=1, minutes=2).items():
        with pytest.raises(InputError, match=k): make(**{k:v})
    with pytest.raises(InputError, match='3D'): make(SliceDataLoaders)
    with pytest.raises(InputError, match='minutes'):
        VolumeDataLoaders.from_df(df.assign(site='a'), path, label_col='site', minutes=2)
    for odd in (0, -1, 'two'):
        with pytest.raises(InputError, match='minutes'): suggest_plan(df, path=path, minutes=odd)

def test_folds_and_seeds_share_one_plan(study, cache, tmp_path, measured):
    "And a comparison that goes on in another call"
    path,df = study
    df = df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])
    arms = {'3D':dict(ndim=3, minutes=1, nf=4, depth=2, spacing=1.25)}
    def comparison():
        return Comparison(df, arms, path=tmp_path/'c', cache=cache, folds=2, codes=CODES, budget=dict(updates=1),
                          device='cpu')
    comparison().run()
    comparison().run()
    assert len(measured)==1
    plan, = (tmp_path/'c').glob('plan*.json')
    assert Plan.from_json(plan.read_text()).minutes==1

def say(learn, minutes, capsys, monkeypatch, seconds):
    "What fit_for prints where an update takes so many seconds; nothing is trained"
    monkeypatch.setattr(pace, 'step_seconds', lambda learn: (0., seconds))
    class Stop(Callback):
        order = 80
        def before_epoch(self): raise CancelFitException()
    with learn.no_bar(): learn.fit_for(minutes, cbs=Stop())
    return capsys.readouterr().out

def test_fit_for_says_how_many_updates_there_will_be(learner, capsys, monkeypatch, recwarn):
    assert re.search(r'about \d{3,} updates in 2 minutes', say(learner(3), 2, capsys, monkeypatch, .01))
    assert not [o for o in recwarn if 'updates' in str(o.message)]

def test_fit_for_warns_of_fewer_than_a_hundred(learner, capsys, monkeypatch):
    with pytest.warns(UserWarning, match=r'from_df\(…, minutes=2\)'): out = say(learner(3), 2, capsys, monkeypatch, 10.)
    assert re.search(r'about \d{1,2} updates', out)

@pytest.mark.parametrize('ndim', (3,2))
def test_timing_leaves_no_trace(learner, ndim):
    "Weights, running averages, gradients, modes and every source of chance are as before"
    learn = learner(ndim)
    def state():
        return ([v.clone() for v in learn.model.state_dict().values()], [m.training for m in learn.model.modules()],
                torch.get_rng_state(), np.random.get_state()[1].copy(),
                         random.getstate(), [dl.rng.getstate() for dl in learn.dls.loaders],
                         [p.grad for p in learn.model.parameters()])
    a = state()
    load_s,update_s = pace.step_seconds(learn)
    b = state()
    assert load_s>0 and update_s>0
    assert all(torch.equal(x, y) for x,y in zip(a[0], b[0])) and a[1]==b[1] and torch.equal(a[2], b[2])
    assert (a[3]==b[3]).all() and a[4]==b[4] and a[5]==b[5] and all(o is None for o in b[6])

def test_a_resumed_fit_shows_its_bar(learner, capsys):
    "The bar of a fit that goes on does not begin at zero"
    learn = learner(3)
    learn.fit_for(.03, cbs=ResumeCallback('r.pth', keep=True))
    learn.fit_for(.03, cbs=ResumeCallback('r.pth', keep=True))

def test_a_fit_that_was_cut_shows_its_bar(learner, capsys):
    class Cut(Callback):
        "Stop in the second batch"
        order = 70
        def after_batch(self):
            if self.training and self.iter==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learner(3).fit_for(.05, cbs=[ResumeCallback('c.pth', 1), Cut()])
    learner(3).fit_for(.05, cbs=ResumeCallback('c.pth', 1))
