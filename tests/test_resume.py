"Training that is killed and started again ends as if it had not been."
import os
import shutil
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import forked
import nibabel as nib
import pytest
import torch
from fastai.callback.all import (
    Callback,
    CSVLogger,
    EarlyStoppingCallback,
    GradientAccumulation,
    ReduceLROnPlateau,
    SaveModelCallback,
    TerminateOnNaNCallback,
)
from fastai.optimizer import OptimWrapper, ranger
from fastcore.foundation import L
from phantoms import CODES, dies

from fastmed.all import (
    BudgetCallback,
    CostCallback,
    DiceCallback,
    ResumeCallback,
    SliceDataLoaders,
    TorchIOTransform,
    VolumeDataLoaders,
    set_seed,
    unet2d_learner,
    unet3d_learner,
)

# batches between two states that are written: the cut falls between them, on one, or within an epoch
EVERY = [3, *[pytest.param(o, marks=pytest.mark.slow) for o in (1,None)]]

class Lights(Callback):
    "Go out after so many batches"
    def __init__(self, n): self.left = n
    def after_batch(self):
        if self.training:
            self.left -= 1
            if not self.left: raise KeyboardInterrupt

def make(path, df, tmp, ndim=3, **kwargs):
    set_seed(3, reproducible=True)
    dls = (VolumeDataLoaders if ndim==3 else SliceDataLoaders).from_df(df, path,
            **{**dict(codes=CODES, spacing=1.25, patch=16, bs=2, samples_per_case=2, num_workers=0, device='cpu',
                      cache=Path(tmp)/'s'), **kwargs})
    return (unet3d_learner if ndim==3 else unet2d_learner)(dls, nf=4, depth=2, path=Path(tmp), fast=False)

def fit(learn, every, lights=None, epochs=3):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2, cbs=[ResumeCallback('r.pth', every)]+([Lights(lights)] if lights else []))
    return learn

def same(a, b):
    return all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.mark.parametrize('ndim', [3,2])
@pytest.mark.parametrize('every', EVERY)
@pytest.mark.parametrize('cuts', [(2,),(6,),(7,3)])
def test_the_same_bits(study, tmp_path, ndim, every, cuts):
    "Cut anywhere, once or twice: the weights, the losses and the table of one that was never stopped"
    path,df = study
    whole = fit(make(path, df, tmp_path/'a', ndim), every)
    for n in cuts:
        with pytest.raises(KeyboardInterrupt): fit(make(path, df, tmp_path/'b', ndim), every, n)
    cut = fit(make(path, df, tmp_path/'b', ndim), every)
    assert same(whole, cut) and not (tmp_path/'b'/'r.pth').exists()
    assert [float(o) for o in whole.recorder.losses]==[float(o) for o in cut.recorder.losses]
    assert whole.recorder.lrs==cut.recorder.lrs
    assert [list(map(float, o)) for o in whole.recorder.values]==[list(map(float, o)) for o in cut.recorder.values]

def test_random_item_transforms_too(study, tmp_path):
    import torchio as tio
    path,df = study
    kw = dict(item_tfms=TorchIOTransform(tio.RandomBlur()))
    whole = fit(make(path, df, tmp_path/'a', **kw), 2)
    with pytest.raises(KeyboardInterrupt): fit(make(path, df, tmp_path/'b', **kw), 2, 5)
    assert same(whole, fit(make(path, df, tmp_path/'b', **kw), 2))

class Dark(Callback):
    "Go out when all is done, before or after the last state is written"
    def __init__(self, order): self.order = order
    def after_fit(self): raise KeyboardInterrupt

@pytest.mark.parametrize('keep', [False,True])
@pytest.mark.parametrize('order', [64,66])
def test_cut_at_the_very_end(study, tmp_path, keep, order):
    "Between the last batch and the moment that the model is saved: nothing is trained again, and nothing is forgotten"
    path,df = study
    whole = fit(make(path, df, tmp_path/'a'), 1)
    def go(*cbs):
        l = make(path, df, tmp_path/'b')
        with l.no_bar(), l.no_logging(): l.fit_one_cycle(3, 1e-2, cbs=[ResumeCallback('r.pth', 1, keep=keep), *cbs])
        return l
    with pytest.raises(KeyboardInterrupt): go(Dark(order))
    if not keep and order>65: return                                   # the file is gone: the caller said so
    for _ in range(1+keep):
        l = go(Lights(1))
        assert same(whole, l) and [float(o) for o in whole.recorder.losses]==[float(o)
                for o in l.recorder.losses] and len(l.recorder.values)==3
    assert (tmp_path/'b'/'r.pth').exists()==keep

def test_another_fit_is_refused(study, tmp_path):
    path,df = study
    with pytest.raises(KeyboardInterrupt): fit(make(path, df, tmp_path), 1, 2)
    with pytest.raises(ValueError, match='another fit.*epochs: 3 then, 5 now'):
        fit(make(path, df, tmp_path), 1, epochs=5)
    (tmp_path/'r.pth').write_bytes((tmp_path/'r.pth').read_bytes()[:5000])
    with pytest.raises(ValueError, match='not whole'): fit(make(path, df, tmp_path), 1)
    with pytest.raises(ValueError, match='1 or more'): ResumeCallback(every=0)

class Clock(Callback):
    "What is spent of the time when a fit goes on; before that, a batch takes a fifth of a second"
    order,first = 70,None
    def after_batch(self):
        if self.first is None and not getattr(self.learn.resume, 'skip', 0):
            self.first = time.perf_counter()-self.learn.budget.t0

class Slow(Callback):
    "A batch of a fifth of a second at least"
    def before_batch(self): time.sleep(.2)

def test_by_the_clock(study, tmp_path, capsys):
    "fit_for goes on with what was left of its time, and says that this is not to the bit"
    path,df = study
    l = make(path, df, tmp_path)
    cb = lambda: ResumeCallback('r.pth', 1)
    with l.no_bar(), l.no_logging(), pytest.raises(KeyboardInterrupt): l.fit_for(1/20, cbs=[cb(), Slow(), Lights(4)])
    l,clock = make(path, df, tmp_path),Clock()
    with l.no_bar(), l.no_logging(): l.fit_for(1/20, cbs=[cb(), clock])
    # what the fourth batch took is lost with it, where the clock was kept before it ended
    assert clock.first>=3*.2 and 'not bit-identical' in capsys.readouterr().out

def columns(learn): return [[float(v) for v in o] for o in learn.recorder.values]
def log_of(tmp): return (Path(tmp)/'history.csv').read_text().splitlines()
def without_time(rows): return [r.rsplit(',', 1)[0] for r in rows]

def trackers():
    return dict(early=lambda: [EarlyStoppingCallback('dice', patience=3)],
            plateau=lambda: [ReduceLROnPlateau('dice', patience=1, factor=2)], best=lambda: [SaveModelCallback('dice')],
            log=lambda: [CSVLogger()],
                appended=lambda: [CSVLogger(append=True)],
            dice=lambda: [DiceCallback(n=1, every=2), EarlyStoppingCallback('case_dice', patience=2)],
            collected=lambda: [GradientAccumulation(4), CostCallback()],
            graph=lambda: [TerminateOnNaNCallback(), BudgetCallback(updates=17)])

def fit_with(learn, cbs, every, lights=None):
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, 3e-2, cbs=[ResumeCallback('r.pth', every), *cbs]+([Lights(lights)] if lights else []))
    return learn

@pytest.mark.parametrize('every', EVERY)
@pytest.mark.parametrize('which', [*trackers(), 'all'])
def test_trackers_and_loggers_go_on(study, tmp_path, which, every):
    """Those that watch the table, write it or count keep what they had: weights, rates, table, log and counts are those
    of a fit that was never stopped"""
    path,df = study
    def cbs():
        some = {k:f() for k,f in trackers().items() if which in (k,'all')}
        if which=='all': some.pop('appended')
        return sum(some.values(), [])
    mine = cbs()
    for o in 'ab':
        (tmp_path/o).mkdir()
        (tmp_path/o/'history.csv').write_text('an earlier fit\n')
    whole = fit_with(make(path, df, tmp_path/'a'), mine, every)
    for n in (7, 5):
        with pytest.raises(KeyboardInterrupt): fit_with(make(path, df, tmp_path/'b'), cbs(), every, n)
    again = cbs()
    cut = fit_with(make(path, df, tmp_path/'b'), again, every)
    assert same(whole, cut) and whole.recorder.lrs==cut.recorder.lrs and str(columns(whole))==str(columns(cut))
    assert [list(h.items()) for h in whole.opt.hypers]==[list(h.items()) for h in cut.opt.hypers]
    for a,b in zip(mine, again):
        for k in ('best','wait','count','spent','rows'):
            if k in a.__dict__ and not isinstance(a, CostCallback):
                assert str(a.__dict__[k])==str(b.__dict__[k]), (a, k)
        if isinstance(a, CostCallback):
            assert [a.total[k] for k in ('epochs','updates','voxels')]==[b.total[k] for k in ('epochs','updates',
                    'voxels')]
    if which in ('log','appended','all'):
        assert without_time(log_of(tmp_path/'a'))==without_time(log_of(tmp_path/'b'))
        assert len(log_of(tmp_path/'b'))==1+len(whole.recorder.values)+(which=='appended')
    if which in ('best','all'):
        a,b = [torch.load(tmp_path/o/'models'/'model.pth').values() for o in 'ab']
        assert all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

def test_the_graph_and_training_metrics_go_on(study, tmp_path):
    "The recorder's own metrics of training, which count within an epoch, and the schedule that is plotted"
    path,df = study
    def go(tmp, lights=None):
        l = make(path, df, tmp)
        l.recorder.train_metrics = True
        return fit(l, 1, lights)
    whole = go(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'b', 6)
    cut = go(tmp_path/'b')
    assert str(columns(whole))==str(columns(cut)) and whole.recorder.hps==cut.recorder.hps

class Watch(Callback):
    "Who sees what: a callback that reads the table after each epoch, as trackers do, and counts batches"
    order = 60
    def __init__(self): self.epochs,self.batches = [],0
    def before_batch(self): self.batches += self.training
    def after_epoch(self): self.epochs.append((self.epoch, len(self.recorder.values[-1])))

def test_what_was_done_is_seen_by_no_other_callback(study, tmp_path):
    path,df = study
    seen = []
    with pytest.raises(KeyboardInterrupt): fit_with(make(path, df, tmp_path), [Watch()], 1, 6)
    class Fresh(Watch):
        def before_batch(self): seen.append((self.epoch, self.iter))
    w = Watch()
    l = fit_with(make(path, df, tmp_path), [w, Fresh()], 1)
    assert w.epochs==[(e, len(l.recorder.metric_names)-2) for e in range(5)]
    assert seen[0]==divmod(5, len(l.dls.train)), 'no batch that was done'
    assert w.batches==5*len(l.dls.train)

def test_looking_does_not_end_a_fit(study, tmp_path):
    "`validate`, `get_preds` and `lr_find` between the kill and the call that goes on leave file and weights alone"
    path,df = study
    l = make(path, df, tmp_path/'b')
    cb = ResumeCallback('r.pth', 1)
    l.add_cb(cb)
    with pytest.raises(KeyboardInterrupt), l.no_bar(), l.no_logging(): l.fit_one_cycle(3, 1e-2, cbs=Lights(6))
    was = (tmp_path/'b'/'r.pth').read_bytes()
    l = make(path, df, tmp_path/'b')
    l.add_cb(ResumeCallback('r.pth', 1))
    before = [p.clone() for p in l.model.parameters()]
    with l.no_bar(), l.no_logging():
        l.validate()
        l.get_preds()
    assert (tmp_path/'b'/'r.pth').read_bytes()==was and all(torch.equal(a, b) for a,
            b in zip(before, l.model.parameters()))

@pytest.mark.slow
def test_sigkill_from_the_shell(study, tmp_path):
    "`fastmed train` killed, then with --resume: the model of a run that was not killed"
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    main = 'from fastmed.cli import main; import sys; sys.exit(main())'
    def train(out, *more, code=main):
        (tmp_path/'run.py').write_text(code)
        data = [study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--codes', ','.join(CODES),
                '--spacing', '1.25']
        return forked.run([tmp_path/'run.py', 'train', *data, '--out', tmp_path/out, '--epochs', '3', '--cache',
                           tmp_path/'s', *more], tmp_path, env)
    assert train('a.pkl').returncode==0
    kept = tmp_path/'b.pkl.resume'
    assert train('b.pkl', code=dies('self.training and self.epoch==1 and i==1')+main).returncode==-signal.SIGKILL
    assert kept.exists() and not (tmp_path/'b.pkl').exists()
    r = train('b.pkl', '--resume')
    assert r.returncode==0 and 'nothing to resume' not in r.stdout and not kept.exists(), r.stderr
    import warnings

    from fastai.learner import load_learner
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert same(load_learner(tmp_path/'a.pkl'), load_learner(tmp_path/'b.pkl'))

@pytest.mark.parametrize('opt_func', [ranger, partial(OptimWrapper, opt=torch.optim.AdamW)], ids=['ranger','torch'])
def test_other_optimizers_go_on(study, tmp_path, opt_func):
    "One that wraps another, and one of torch's: their own counts and averages are kept too"
    path,df = study
    def learner(folder):
        l = make(path, df, tmp_path/folder)
        l.opt_func = opt_func
        return l
    whole = fit(learner('a'), 1)
    with pytest.raises(KeyboardInterrupt): fit(learner('b'), 1, 8)
    assert same(whole, fit(learner('b'), 1))

# --- which fit it is

def stopped(study, tmp_path, df=None, n=2, call=None, **kwargs):
    "A fit that was killed, and a function that makes the Learner anew"
    path,own = study
    with pytest.raises(KeyboardInterrupt):
        (call or fit_so)(make(path, own if df is None else df, tmp_path, **kwargs),
                cbs=[ResumeCallback('r.pth', 1), Lights(n)])

def fit_so(learn, cbs=None, how='fit_one_cycle', epochs=3, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, how)(epochs, lr, cbs=L(cbs), **kwargs)

def refused(learn, was, **kwargs):
    "What is said of a call that differs; the file stays as it was"
    fn = learn.path/'r.pth'
    with pytest.raises(ValueError) as e: fit_so(learn, ResumeCallback('r.pth', 1), **kwargs)
    assert fn.read_bytes()==was and str(e.value).endswith('Call the fit as it was, or remove the file to start anew')
    return str(e.value)

@pytest.fixture
def killed(study, tmp_path):
    "Folder and bytes of a fit that was killed, and a function that makes its Learner anew"
    stopped(study, tmp_path)
    return (tmp_path/'r.pth').read_bytes(),lambda df=None, **kwargs: make(study[0], study[1] if df is None else df,
            tmp_path, **kwargs)

@pytest.mark.parametrize('kwargs,says', [(dict(lr=2e-2), 'lr: 0.0004 → 0.01 → 1e-07 (course'),
        (dict(pct_start=.5), 'lr: 0.0004 → 0.01'), (dict(how='fit_flat_cos'), 'mom: 0.95 → 0.85 → 0.95 (course'),
        (dict(wd=.1), 'wd: 0.01 then, 0.1 now'),
    (dict(moms=(.9,.8,.9)), 'mom: 0.95 → 0.85 → 0.95'), (dict(epochs=5), 'epochs: 3 then, 5 now')])
def test_another_rate_or_schedule_is_refused(killed, kwargs, says):
    was,again = killed
    said = refused(again(), was, **kwargs)
    assert says in said and 'cases' not in said and 'loss' not in said and 'patch' not in said

def test_another_loss_optimizer_batch_or_patch_is_refused(killed):
    was,again = killed
    for k,o,says in (('loss_func', torch.nn.CrossEntropyLoss(), 'loss: '),
            ('loss_func', torch.nn.CrossEntropyLoss(torch.tensor([1.,2,3])), '(1, 2, 3)'),
            ('opt_func', ranger, 'optimizer: Adam then, ranger now')):
        l = again()
        setattr(l, k, o)
        assert says in refused(l, was)
    l = again()
    l.gradient_clip.max_norm = 1.
    assert 'gradients up to: 12 then, 1 now' in refused(l, was)
    said = refused(again(bs=4), was)
    assert 'batch: 2 then, 4 now' in said and 'batches: ' in said
    assert 'patch: (16, 16, 16) then, (8, 16, 16) now' in refused(again(patch=(8,16,16)), was)
    assert 'preprocessing, spacing: ' in refused(again(spacing=1.), was)
    with pytest.raises(ValueError, match='budget: none then, 100 updates now'):
        fit_so(again(), [ResumeCallback('r.pth', 1), BudgetCallback(updates=100)])

def test_another_split_is_refused(killed, study, tmp_path):
    "Named with the cases; so is a case whose file, mask or label is another now, and another order"
    was,again = killed
    df = study[1]
    learn = again()
    valid,train = [list(d.items['case']) for d in (learn.dls.valid_ds, learn.dls.train_ds)]
    said = refused(again(seed=7), was)
    assert ('training cases: ' in said and 'validation cases: ' in said and 'no longer there: ' in said
            and 'new: ' in said)
    said = refused(again(df[df.case!=train[0]].assign(is_valid=df.case.isin(valid)), valid_col='is_valid'), was)
    assert (f'training cases: {len(train)} then, {len(train)-1} now (no longer there: {train[0]})' in said
            and 'validation cases' not in said)
    # the same names, other voxels
    copied = tmp_path/'copied'
    shutil.copytree(study[0], copied)
    fn = copied/df.set_index('case').loc[train[1], 'mask']
    im = nib.load(fn)
    a = im.get_fdata().copy()
    a[a>0] = 1
    nib.Nifti1Image(a.astype('uint8'), im.affine, im.header).to_filename(fn)
    said = refused(make(copied, df, tmp_path), was)
    assert (f'training cases: {len(train)} then, {len(train)} now (other contents: {train[1]})' in said
            and 'validation cases' not in said)

def test_the_same_data_elsewhere_go_on(study, tmp_path):
    "What counts is what stands in the files, not where they lie, nor whether the store is kept"
    path,df = study
    whole = fit(make(path, df, tmp_path/'a'), 1)
    stopped(study, tmp_path/'b')
    shutil.copytree(path, tmp_path/'copied')
    shutil.rmtree(tmp_path/'b'/'s')
    learn = make(tmp_path/'copied', df, tmp_path/'b')
    assert same(whole, fit(learn, 1))

def test_one_changed_byte_is_noticed(killed, tmp_path):
    was,again = killed
    for at in (0, 30, 100, len(was)//2, len(was)-1):
        b = bytearray(was)
        b[at] ^= 1
        (tmp_path/'r.pth').write_bytes(b)
        with pytest.raises(ValueError, match='r.pth: .*not whole'): fit_so(again(), ResumeCallback('r.pth'))
        assert (tmp_path/'r.pth').read_bytes()==b

def test_a_file_of_another_version_is_named(killed, tmp_path):
    was,again = killed
    torch.save(dict(terms={}, callbacks={}), tmp_path/'r.pth')
    with pytest.raises(ValueError, match=r'earlier version of fastmed \(0.1.0'):
        fit_so(again(), ResumeCallback('r.pth'))
    (tmp_path/'r.pth').write_bytes(was.replace(b'Callback 2', b'Callback 3', 1))
    with pytest.raises(ValueError, match='another version of fastmed .format 3'):
        fit_so(again(), ResumeCallback('r.pth'))

# --- several fits, one training

@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('cuts', [(2,), (8,), (9,), (14,), (10,2)])
def test_fine_tune_goes_on_in_its_second_fit(study, tmp_path, keep, cuts):
    """Cut in the first, between the two, or in the second: what was done is passed over, and the end is that of one
    that was never stopped"""
    path,df = study
    def tune(folder, *cbs):
        learn = make(path, df, tmp_path/folder)
        learn.pretrained = True
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(2, 1e-2, freeze_epochs=2, cbs=[ResumeCallback('r.pth', 1, keep=keep), *cbs])
        return learn
    whole = tune('a')
    for n in cuts:
        with pytest.raises(KeyboardInterrupt): tune('b', Lights(n))
    cut = tune('b')
    assert same(whole, cut) and (tmp_path/'b'/'r.pth').exists()==keep
    assert [t.to_csv() for t in whole.history]==[t.to_csv() for t in cut.history]
    with pytest.raises(ValueError, match='another fit') if keep else nullcontext():
        learn = make(path, df, tmp_path/'b')
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, cbs=ResumeCallback('r.pth', keep=keep))

def test_two_alike_fits(study, tmp_path):
    "The second is not taken for the first, with one callback and with the Learner's own"
    path,df = study
    def twice(folder, *cbs, keep=False):
        learn = make(path, df, tmp_path/folder)
        learn.add_cb(ResumeCallback('r.pth', 1, keep=keep))
        for _ in range(2):
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=L(cbs))
        return learn
    whole = twice('a')
    with pytest.raises(KeyboardInterrupt): twice('b', Lights(5))
    assert same(whole, twice('b')) and same(whole, twice('c', keep=True))

def test_another_learner_is_another_training(study, tmp_path):
    "One callback for the folds of a loop: the first fold is never given the weights of the second"
    path,df = study
    def folds(*cbs):
        cb = ResumeCallback('r.pth', 1)
        for k in range(2): fit_so(make(path, df, tmp_path, seed=k), [cb, *cbs])
    n = 3*len(make(path, df, tmp_path).dls.train)
    with pytest.raises(KeyboardInterrupt): folds(Lights(n+2))
    with pytest.raises(ValueError, match='another fit.*training cases'): folds()

@pytest.mark.parametrize('kwargs,says',
        [(dict(batch_tfms=[]), 'batch transforms: '), (dict(foreground=.9), 'item transforms: ')])
def test_another_augmentation_is_refused(killed, kwargs, says):
    was,again = killed
    assert says in refused(again(**kwargs), was)

def test_another_network_of_the_same_weights_is_refused(killed):
    "An activation has no weights of its own; other metrics would end in an error when all is trained"
    was,again = killed
    l = again()
    l.model.encoder[0][2] = torch.nn.ELU()
    assert 'network: ' in refused(l, was)
    l = again()
    l.metrics = l.metrics[:1]
    assert 'metrics: ' in refused(l, was)

@pytest.mark.parametrize('edit', [lambda s: {k:v for k,v in s.items() if k!='recorder'}, lambda s: [1],
        lambda s: {**s, 'epoch':'1'}, lambda s: {**s, 'epoch':-1}, lambda s: {**s, 'epoch':99},
    lambda s: {**s, 'model':{}}, lambda s: {**s, 'opt':{}}, lambda s: {**s, 'earlier':[{}]},
        lambda s: {**s, 'now':{**s['now'], 'torch':torch.zeros(3)}}, lambda s: {**s, 'terms':{}},
        lambda s: {**s, 'pct_train':float('nan')}, lambda s: {**s, 'done':True},
    lambda s: {**s, 'callbacks':{k:{**v, 'values':{'before_batch':1}} for k,v in s['callbacks'].items()}}])
def test_a_state_that_no_fit_wrote_is_refused(killed, tmp_path, edit):
    "A right sum does not make a state right: the file is named, not a line of fastai"
    from fastmed.learn.fingerprint import read_state, write_state
    was,again = killed
    fn = tmp_path/'r.pth'
    write_state(fn, edit(read_state(fn)))
    odd = fn.read_bytes()
    with pytest.raises(ValueError, match='r.pth: does not hold what a fit left there.*Remove it'):
        fit_so(again(), ResumeCallback('r.pth', 1))
    assert fn.read_bytes()==odd

def test_a_state_does_not_say_where_callbacks_write(study, tmp_path):
    from fastmed.learn.fingerprint import read_state, write_state
    learn = lambda: make(*study, tmp_path)
    with pytest.raises(KeyboardInterrupt): fit_so(learn(), [ResumeCallback('r.pth', 1), SaveModelCallback(), Lights(8)])
    s = read_state(tmp_path/'r.pth')
    s['callbacks']['SaveModelCallback 1']['values'] = {'fname':'planted'}
    write_state(tmp_path/'r.pth', s)
    fit_so(learn(), [ResumeCallback('r.pth', 1), SaveModelCallback()])
    assert [o.name for o in (tmp_path/'models').iterdir()]==['model.pth']

def test_a_state_changes_no_setting(study, tmp_path):
    "Though its sum is right, and what it says of the settings too"
    from fastmed.learn.fingerprint import read_state, write_state
    def fit(*cbs):
        learn = make(*study, tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(99, 1e-2, cbs=[ResumeCallback('r.pth', 1), BudgetCallback(updates=9), *cbs])
    with pytest.raises(KeyboardInterrupt): fit(Lights(2))
    s = read_state(tmp_path/'r.pth')
    s['callbacks']['BudgetCallback 1']['values']['amount'] = 10**9
    write_state(tmp_path/'r.pth', s)
    with pytest.raises(ValueError, match='does not hold what a fit left there.*budget: 9 updates then, 1e'): fit()
