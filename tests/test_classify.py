"Learners that answer for cases: they learn, they answer the same everywhere, their scores are right."
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import affine_of, python, write_case
from PIL import Image
from torch import nn

from fastmed.all import *
from fastmed.core import ArgumentError, FileError
from fastmed.metrics.scores import (
    balanced_accuracy,
    choose_point,
    label_scores,
    mean_abs_error,
    r_squared,
    scores_interval,
    sensitivity_specificity,
)
from fastmed.models.classifiers import SmallResNet, shape_measures

for k in [o for o in globals() if o.startswith('test')]: del globals()[k]    # fastcore's own

QUIET = dict(device='cpu', num_workers=0)

def quiet_fit(learn, n=1, lr=None, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, **kw)
    return learn

# ---- scores, against scikit-learn

@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('ties', [False,True])
def test_scores_are_those_of_sklearn(seed, ties):
    from sklearn import metrics as m
    rng = np.random.default_rng(seed)
    t = rng.integers(2, size=40)
    t[:2] = 0,1
    s = rng.normal(size=40)+t
    if ties: s = s.round(0)
    assert math.isclose(roc_auc(pred=s, targ=t), m.roc_auc_score(t, s)) and math.isclose(average_precision(pred=s,
            targ=t),
            m.average_precision_score(t, s))
    assert math.isclose(balanced_accuracy(pred=s>.5, targ=t),
                        m.balanced_accuracy_score(t, s>.5)) and math.isclose(r_squared(pred=s, targ=t),
            m.r2_score(t, s)) and math.isclose(mean_abs_error(pred=s, targ=t), m.mean_absolute_error(t, s))
    P = rng.dirichlet([1,1,1], 40)
    y = rng.integers(3, size=40)
    assert math.isclose(label_scores('category', list('abc'), pred=P, targ=y)['roc_auc','mean'],
            m.roc_auc_score(y, P, multi_class='ovr'))
    for how in (('sensitivity',.9),('specificity',.9),'youden'):
        h = choose_point(pred=s, targ=t, point=how)
        se,sp = sensitivity_specificity(pred=s, targ=t, point=h)
        fpr,tpr,_ = m.roc_curve(t, s, drop_intermediate=False)
        if how=='youden': assert math.isclose(se+sp, 1+(tpr-fpr).max())
        elif how[0]=='sensitivity': assert se>=.9-1e-12 and math.isclose(sp, 1-fpr[tpr>=.9-1e-12].min())
        else: assert sp>=.9-1e-12 and math.isclose(se, tpr[fpr<=.1+1e-12].max())

def test_interval_covers_and_knows_subjects():
    "95 intervals of 100 hold the truth, within chance; pictures of one patient told twice narrow nothing"
    hit = 0
    for s in range(40):
        # true AUC 0.80
        rng = np.random.default_rng(s)
        t = rng.integers(2, size=120)
        x = rng.normal(size=120)+1.19*t
        r = scores_interval('category', [0,1], pred=np.c_[-x,x], targ=t, n_boot=200, seed=s).loc['roc_auc']
        hit += r.low<=.8<=r.high
    assert 34<=hit<=40, hit
    a = scores_interval('category', [0,1], pred=np.c_[-x,x], targ=t, n_boot=300)
    b = scores_interval('category', [0,1], pred=np.c_[-x,x][np.r_[0:120,0:120,0:120]], targ=np.r_[t,t,t],
                        groups=np.r_[0:120,0:120,0:120], n_boot=300)
    assert (np.allclose(a[['low','high']].astype(float), b[['low','high']].astype(float)) and (b.subjects==120).all()
                                                            and (b.n==360).all())
    c = scores_interval('category', [0,1], pred=np.c_[-x,x][np.r_[0:120,0:120,0:120]], targ=np.r_[t,t,t], n_boot=300)
    assert c.loc['roc_auc','high']-c.loc['roc_auc','low']<.75*(b.loc['roc_auc','high']-b.loc['roc_auc','low'])

def label_cases(task, rng):
    "Forty random cases of a task: vocab, targets, predictions"
    if task=='regression':
        y = rng.normal(size=(40,2))
        return ['x','z'],y,y+rng.normal(size=(40,2))
    if task=='multi': return list('abc'),(rng.random((40,3))<.4).astype(float),rng.random((40,3)).round(1)
    vocab = list('ab') if task=='two' else list('abc')
    return vocab,rng.integers(len(vocab), size=40),rng.dirichlet(np.ones(len(vocab)), 40).round(1)

@pytest.mark.parametrize('task', ['two','category','multi','regression'])
def test_statistics_are_the_scores_of_the_drawn_rows(task):
    "Weights that say how often a case was drawn, and the drawn rows themselves, also where a class was not drawn"
    from fastmed.metrics.scores import label_statistics
    rng = np.random.default_rng(0)
    vocab,y,p = label_cases(task, rng)
    name = 'category' if task=='two' else task
    stats = label_statistics(name, vocab, y, p)
    for n in (40,40,3,2,1):
        rows = rng.integers(40, size=n)
        weights = np.bincount(rows, minlength=40)[None].astype(float)
        expected = label_scores(name, vocab, pred=p[rows], targ=y[rows])
        found = {key:float(stat(weights)[0]) for key,stat in stats.items()}
        assert list(found)==list(expected)
        assert np.allclose(list(found.values()), list(expected.values()), equal_nan=True)

def test_r2_of_targets_that_are_alike_is_nan():
    "Rounding of their mean is no variance, neither in the sample nor in a draw of one subject"
    assert np.isnan(r_squared(pred=[.2]*3, targ=[.1]*3))
    y = np.array([50.1]*3+[61.3]*3)
    p = y+[1,-2,1,.5,2,-1]
    r = scores_interval('regression', ['age'], pred=p[:,None], targ=y[:,None], groups=list('aaabbb')).loc['r2']
    assert .9<r.low<=r.value<=r.high<=1

def test_a_rule_chooses_its_point_once():
    "On all cases, not in each draw, for findings too; where it lacks a class there is no rate"
    rng = np.random.default_rng(0)
    y = (rng.random((60,2))<.4).astype(float)
    p = .4*y+.6*rng.random((60,2))
    by_rule = scores_interval('multi', ['a','b'], pred=p, targ=y, point='youden', n_boot=50).query("of=='a'")
    given = scores_interval('multi', ['a','b'], pred=p, targ=y,
            point=choose_point(pred=p[:,0], targ=y[:,0], point='youden'), n_boot=50).query("of=='a'")
    assert by_rule.equals(given)
    assert np.isnan(sensitivity_specificity(pred=[.2,.9], targ=[1,1], point='youden')).all()

# ---- losses

def test_losses():
    set_seed(0)
    p = torch.randn(6,3)
    t = torch.tensor([0,1,2,0,1,2])
    y = (torch.rand(6,3)>.5).float()
    r = torch.randn(6,3)*40+100
    w = torch.tensor([1.,2.,3.])
    assert torch.equal(LabelLoss('category', weight=w, label_smoothing=.1)(p, TensorCategory(t)),
                                 F.cross_entropy(p, t, w, label_smoothing=.1))
    assert torch.allclose(LabelLoss('multi', pos_weight=w)(p, TensorMultiCategory(y)),
                                    F.binary_cross_entropy_with_logits(p, y, pos_weight=w))
    for k,f in (('huber',F.smooth_l1_loss),('mse',F.mse_loss),('l1',F.l1_loss)):
        assert torch.allclose(LabelLoss('regression', sd=[10.]*3, loss=k)(r+5, r), f(r/10+.5, r/10), atol=1e-5)
    for task,a,b in (('category',p,t),('multi',p,y),('regression',r,r+1)):
        l = LabelLoss(task)
        one = l(a, b)
        l.reduction = 'none'
        assert l(a, b).shape==(6,) and torch.allclose(l(a, b).mean(), one)
        assert l(a.bfloat16(), b).dtype==torch.float32

# ---- Learners on volumes

def box(shape):
    m = np.zeros(shape)
    m[6:10,2:6,2:6] = 1
    return m

@pytest.fixture(scope='module')
def cases(tmp_path_factory):
    "Twenty-four phantoms of twelve subjects; every second subject has a bright box in its scans, and has a number"
    path = tmp_path_factory.mktemp('cases')
    side = lambda a: a+1.5*np.ptp(a)*box(a.shape)
    rows = [dict(write_case(path, f'c{i:02}', affine_of('RAS' if i%3 else 'LAS', (1,1,1)), (16,16,12+2*(i%2)), seed=i,
            image=side if (i//2)%2 else (lambda a: a)), subject=f's{i//2}', side=['none','lit'][(i//2)%2],
            size=1000.+500*((i//2)%2)+i, a=(i//2)%2, b=i%2) for i in range(24)]
    return path,pd.DataFrame(rows)

def loaders(cases, cls=VolumeDataLoaders, **kw):
    path,df = cases
    return cls.from_df(kw.pop('df', df), path, **{'label_col':'side', 'bs':6, 'cache':path/'cache', 'valid_pct':.34,
                                                  'batch_tfms':None, **QUIET, **kw})

@pytest.fixture(scope='module')
def trained(cases):
    "A Learner that has learnt which scans hold the box"
    set_seed(0)
    dls = loaders(cases)
    dls.path = cases[0]
    return quiet_fit(classifier_learner(dls, 'small_resnet', nf=8, path=cases[0]), 30, 5e-3)

def test_it_learns_and_says_so(trained, cases):
    ev = trained.evaluate()
    s = ev.summary(n_boot=100)
    assert s.loc['roc_auc','value']>.95 and s.loc['accuracy',
                                                  'value']>.85 and (s.subjects==len({*ev.subject})).all() and len(
            ev)==len(trained.dls.valid_ds)
    assert set(ev.columns)=={'case','subject','target','pred','prob_lit','prob_none',
                             'status'} and np.allclose(ev.prob_lit+ev.prob_none, 1)
    row = dict(zip(trained.recorder.metric_names[1:-1], trained.recorder.values[-1]))
    p,t = trained.get_preds()
    assert math.isclose(row['roc_auc'], roc_auc(pred=p[:,1], targ=t), abs_tol=1e-6) and math.isclose(row['accuracy'],
            (p.argmax(1)==t).float().mean().item(), abs_tol=1e-6)
    assert math.isclose(s.loc['roc_auc','value'], roc_auc(pred=p[:,1], targ=t), abs_tol=.02)

def test_everything_of_fastai(trained, tmp_path):
    learn = trained
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.lr_find(num_it=12, show_plot=False)
        p,t = learn.tta(n=2)
    assert p.shape==(len(t),2)
    learn.dls.show_batch(max_n=2)
    learn.show_results(max_n=2)
    learn.show_worst(2)
    i = Interpretation.from_learner(learn)
    i.plot_top_losses(2)
    assert ClassificationInterpretation.from_learner(learn).confusion_matrix().sum()==len(t)
    a = learn.predict(learn.dls.valid_ds.items.iloc[0])
    assert a[0] in ('lit','none') and len(learn.predict(learn.dls.valid_ds.items.iloc[0], with_input=True))==4
    p = learn.get_preds(dl=learn.dls.test_dl(learn.dls.valid_ds.items.iloc[:2]))[0]
    assert torch.allclose(p[0], a[2], atol=2e-2)

def test_a_file_alone_and_its_row_are_the_same_bits(trained, cases):
    path,df = cases
    for i in (0,3):
        assert torch.equal(trained.predict(path/df.image[i])[2],
                trained.predict({**df.iloc[i], 'image':str(path/df.image[i])})[2])
    assert torch.equal(trained.predict(load_volume(path/df.image[3]))[2], trained.predict(path/df.image[3])[2])

def test_orientation_of_the_file_does_not_matter(trained, cases, tmp_path):
    path,df = cases
    x = load_volume(path/df.image[4])
    to_orientation(x, 'PIR').save(tmp_path/'other.nii')
    assert torch.allclose(trained.predict(tmp_path/'other.nii')[2], trained.predict(path/df.image[4])[2], atol=1e-6)

@pytest.fixture(scope='module')
def answers(trained, cases, tmp_path_factory):
    """What a Learner answers here; exported and saved, in a fresh process beside another pipeline: (here, exported,
    saved)"""
    tmp = tmp_path_factory.mktemp('answers')
    path,df = cases
    fn = str(path/df.image[5])
    trained.path = tmp
    trained.export('a.pkl')
    save_model(trained, tmp/'a.safetensors', evaluation=trained.evaluate())
    r = quiet_fit(regression_learner(loaders(cases, label_col='size'), 'small_resnet', nf=4, path=tmp), 1)
    r.export('r.pkl')
    save_model(r, tmp/'r.safetensors')
    here = [trained.predict(fn)[2].tolist(), trained.predict(fn, tta=3)[2].tolist(), r.predict(fn)[2].tolist()]
    out = python(f"""
import sys, json
from fastmed.all import *
torch.set_num_threads({torch.get_num_threads()})
tmp,path = sys.argv[1:]
df = pd.read_json(f'{{tmp}}/df.json')
VolumeDataLoaders.from_df(df, path, label_col='size', spacing=2., normalize='minmax', cache=f'{{tmp}}/other',
                          device='cpu', num_workers=0)
res = []
for a,r in ((load_learner(f'{{tmp}}/a.pkl'),load_learner(f'{{tmp}}/r.pkl')),
        (load_model(f'{{tmp}}/a.safetensors','cpu'),load_model(f'{{tmp}}/r.safetensors','cpu'))):
    res.append([a.predict({fn!r})[2].tolist(), a.predict({fn!r}, tta=3)[2].tolist(), r.predict({fn!r})[2].tolist()])
print('\\n'+json.dumps(res))
""", *[df.to_json(tmp/'df.json') or tmp, path])
    return here,*json.loads(out.strip().splitlines()[-1])

def test_looks_by_name(trained):
    "A flip is a flip, and what a number of views means is the same in `evaluate` and `tta`"
    dl = trained.dls.valid
    x = dl.one_batch()[0].as_subclass(torch.Tensor)
    net = trained.model.eval()
    with torch.no_grad(), trained.no_bar():
        want = (net(x).softmax(1)+net(x.flip(2)).softmax(1))/2
        assert torch.allclose(trained.tta(n=TTA(flips=(0,)))[0][:len(x)], want, atol=1e-4)
        for n in (True, 3, TTA((), rotate=10)):
            assert np.allclose(trained.tta(n=n)[0][:,1].numpy(), trained.evaluate(tta=n).iloc[:,-2].to_numpy(float),
                               atol=1e-4), n
        for n in ('flop', 2.5): pytest.raises(InputError, trained.evaluate, tta=n)

def test_law_1_exported_in_a_fresh_process(answers): assert answers[0]==answers[1]
def test_law_1_model_file_in_a_fresh_process(answers): assert answers[0]==answers[2]

def test_saved_learner_knows(trained, cases, tmp_path):
    fn = save_model(trained, tmp_path/'m.safetensors', evaluation=trained.evaluate())
    l = load_model(fn, 'cpu')
    path,df = cases
    assert isinstance(l,
            CaseLearner) and l.task=='category' and l.label_vocab==trained.label_vocab and 'small_resnet' in repr(
            l) and 'roc_auc none' in l.facts['evaluation']
    assert set(l.saw(df))=={c for c,s in zip(df['case'], df.subject) if s in set(trained.dls.train_ds.items.subject)}
    full = df.assign(image=[str(path/o) for o in df.image])
    assert l.evaluate(full[:3]).prob_lit.tolist()==trained.evaluate(df[:3]).prob_lit.tolist()
    l.get_preds(dl=l.dls.test_dl(full[:2], with_labels=True))
    b = bytearray(fn.read_bytes())
    b[len(b)//2] ^= 1
    (tmp_path/'bad.safetensors').write_bytes(b)
    with pytest.raises(InputError, match='sha256'): load_model(tmp_path/'bad.safetensors')
    own = classifier_learner(trained.dls, lambda a,b: SmallResNet(a, b, 3, 4))
    with pytest.warns(UserWarning, match='not a network with a known name'): save_model(own, tmp_path/'x.safetensors')
    with pytest.raises(InputError, match='arch=make'): load_model(tmp_path/'x.safetensors')
    back = load_model(tmp_path/'x.safetensors', 'cpu', arch=lambda: SmallResNet(1, 2, 3, 4))
    assert torch.equal(back.predict(full.image[0])[2], own.predict(full.image[0])[2])

@pytest.mark.parametrize('kw,net', [(dict(label_col=['a','b']),{}), (dict(label_col=['size','a']),{}),
        (dict(cls=SliceDataLoaders, axis=2, context=1, samples_per_case=2),{}),
        (dict(mask_col='mask', codes=['background','large','small'], size=16),{'arch':'UNet','nf':4,'depth':2}),
        (dict(size=16),{'arch':'resnet10'})])
def test_every_kind_trains_exports_and_ships(cases, tmp_path, kw, net):
    set_seed(1)
    dls = loaders(cases, **kw)
    arch = net.get('arch', 'small_resnet')
    args = {k:v for k,v in net.items() if k!='arch'} or ({} if arch!='small_resnet' else dict(nf=4))
    learn = quiet_fit(classifier_learner(dls, arch, path=tmp_path, **args), 1)
    path,df = cases
    fn = str(path/df.image[0])
    ev = learn.evaluate(df[:4])
    assert (ev.status=='ok').all()
    ev.summary(n_boot=5)
    learn.show_results(max_n=2)
    dls.show_batch(max_n=2)
    p = learn.predict(fn)[2]
    learn.export()
    assert torch.equal(load_learner(tmp_path/'export.pkl').predict(fn)[2], p)
    l = load_model(save_model(learn, tmp_path/'m.safetensors'), 'cpu')
    assert torch.equal(l.predict(fn)[2], p) and l.task==learn.task
    if 'mask_col' in kw:
        m = learn.predict_volume(fn)
        assert tuple(m.shape)==load_volume(fn).shape[1:] and learn.evaluate_masks(df[:2]).status.isin(['ok','missed',
                'false positive']).all() and torch.equal(l.predict_volume(fn).as_subclass(Tensor),
                m.as_subclass(Tensor))
        assert [*learn.recorder.metric_names][3:6]==['dice_large','dice_small','dice']
    else:
        with pytest.raises(InputError, match='labels alone'): learn.predict_volume(fn)

def test_mask_and_label_are_both_learnt(cases):
    set_seed(0)
    dls = loaders(cases, mask_col='mask', codes=['background','large','small'], size=16)
    learn = quiet_fit(classifier_learner(dls, nf=8, depth=3), 30, 1e-2)
    row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    assert row['dice']>.5 and row['roc_auc']>.9, row

def test_numbers_keep_their_unit(cases):
    """The same targets a thousand times larger give answers a thousand times larger; predictions, targets and metrics
    are in the column's unit"""
    out = []
    for k in (1.,1000.):
        set_seed(0)
        learn = quiet_fit(regression_learner(loaders(cases, df=cases[1].assign(size=cases[1]['size']*k),
                                             label_col='size'), 'small_resnet', nf=4, fast=False), 2, 1e-3)
        # before get_preds: fastai adds to the table there
        row = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
        p,t = learn.get_preds()
        out.append(p/k)
        assert t.min()>=1000*k and p.shape==t.shape==(len(t),1)
        assert math.isclose(row['mae'], (p-t).abs().mean().item(), rel_tol=1e-4)
        ev = learn.evaluate()
        assert np.allclose(ev.pred, p[:,0], rtol=1e-3) and math.isclose(ev.summary(n_boot=5).loc['mae','value'],
                (p-t).abs().mean().item(), rel_tol=1e-3)
    assert torch.allclose(*out, rtol=1e-3)

def test_scale_of_numbers_is_that_of_the_training_cases(cases):
    learn = regression_learner(loaders(cases, label_col='size'), 'small_resnet', nf=4)
    t = learn.dls.train_ds.items['size']
    assert math.isclose(learn.model.unscale.mean.item(), t.mean(),
                        rel_tol=1e-5) and math.isclose(learn.model.unscale.sd.item(), t.std(), rel_tol=1e-5)

def test_class_weights_are_used(cases):
    dls = loaders(cases, df=cases[1][:18])
    l = classifier_learner(dls, 'small_resnet', nf=4, weight='balanced').loss_func.weight
    n = dls.train_ds.items.side.value_counts()
    assert np.isclose(l[0]/l[1], n['none']/n['lit']) and classifier_learner(dls, 'small_resnet',
            weight={'lit':1,'none':4}).loss_func.weight.tolist()==[1,4]
    m = loaders(cases, label_col=['a','b'])
    assert classifier_learner(m, 'small_resnet', pos_weight=3.).loss_func.pos_weight.tolist()==[3,3]
    for kw,words in ((dict(weight=[1.]),'one a class'), (dict(pos_weight=2.),'findings'), (dict(weight='best'),'best'),
            (dict(label_smoothing=2.),'label_smoothing'), (dict(weight=[1.,1.], loss_func=nn.CrossEntropyLoss()),
            'default loss'), (dict(ndim=2),'ndim'), (dict(arch='resnet1x'),'resnet1')):
        with pytest.raises(FastmedError, match=words): classifier_learner(dls, **{'arch':'small_resnet', **kw})
    with pytest.raises(InputError, match='classes'): regression_learner(dls)
    with pytest.raises(InputError, match='label_col'):
        classifier_learner(VolumeDataLoaders.from_df(cases[1], cases[0], codes=['background','large','small'], patch=8,
                                                     cache=cases[0]/'cache', **QUIET))

def test_a_case_that_cannot_be_read_is_counted(trained, cases):
    df = cases[1][:3].copy()
    df.loc[1,'image'] = 'images/none.nii'
    df.loc[2,'side'] = 'both'
    ev = trained.evaluate(df)
    assert ev.status.tolist()[0]=='ok' and 'none.nii' in ev.status[1] and 'both' in ev.status[2] and ev.summary(
            n_boot=2).failed.iloc[0]==2
    with pytest.raises(FileError, match='none.nii'): trained.evaluate(df[1:2])

def test_larger_scan_of_tomorrow_is_made_smaller_and_told(trained, tmp_path):
    write_case(tmp_path, 'big', affine_of('RAS', (1,1,1)), (40,24,24), seed=1)
    with pytest.warns(UserWarning, match='not cropped'): trained.predict(tmp_path/'images'/'big.nii')

def test_resume_and_cost(cases, tmp_path):
    class Stop(Callback):
        order = 70
        def __init__(self, at): self.at,self.n = at,0
        def after_batch(self):
            self.n += self.training
            if self.n==self.at and self.training: raise KeyboardInterrupt
    def make():
        set_seed(3)
        return classifier_learner(loaders(cases, batch_tfms='auto'), 'small_resnet', nf=4, path=tmp_path,
                                  cbs=[ResumeCallback(every=1)])
    whole = quiet_fit(make(), 2, 1e-3)
    learn = make()
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, 2, 1e-3, cbs=Stop(3))
    again = quiet_fit(make(), 2, 1e-3)
    assert all(torch.equal(a, b) for a,b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
    c = classifier_learner(loaders(cases), 'small_resnet', nf=4, cbs=CostCallback())
    with c.no_bar(), c.no_logging(): c.fit_for(.02)
    assert c.cost.total['updates']>0 and c.seen

def test_mixup_works(cases):
    for col in ('side','size'):
        quiet_fit(classifier_learner(loaders(cases, label_col=col), 'small_resnet', nf=4, cbs=MixUp(.4)), 1)

def test_encoder_goes_from_task_to_task(cases, tmp_path):
    a = quiet_fit(classifier_learner(loaders(cases), 'small_resnet', nf=4, path=tmp_path), 1)
    a.save_encoder('enc')
    b = regression_learner(loaders(cases, label_col='size'), 'small_resnet', nf=4, path=tmp_path)
    b.load_encoder('enc')
    assert all(torch.equal(x, y) for x,
               y in zip(a.model.encoder.state_dict().values(), b.model.encoder.state_dict().values())) and b.pretrained
    with b.no_bar(), b.no_logging(): b.fine_tune(1, 1e-3)

# ---- radiographs

@pytest.mark.parametrize('spoil', [lambda b: bytes(len(b)), lambda b: b[:-40], lambda b: b[:300]+bytes(60)+b[360:],
                                   lambda b: b''])
def test_a_picture_of_the_cache_that_was_changed_is_decoded_again(tmp_path, spoil):
    "Zeros, a part, or other pixels in its place are not trained on"
    from PIL import Image

    from fastmed.data.radiographs import LoadRadiograph, RadiographPrep
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40,40), dtype=np.uint8)).save(tmp_path/'a.png')
    load = LoadRadiograph(RadiographPrep(32), tmp_path/'s').build([tmp_path/'a.png'])
    was,entry = load.encodes(tmp_path/'a.png').clone(),load.entry(tmp_path/'a.png')
    assert float(was.std())>.5
    entry.write_bytes(spoil(entry.read_bytes()))
    again = LoadRadiograph(RadiographPrep(32), tmp_path/'s')
    assert torch.equal(again.encodes(tmp_path/'a.png'), was)
    whole = again.build([tmp_path/'a.png']).entry(tmp_path/'a.png').read_bytes()
    new = LoadRadiograph(RadiographPrep(32), tmp_path/'s')
    assert torch.equal(new.encodes(tmp_path/'a.png'), was) and len(whole)>2000

def test_radiograph_learner(tmp_path):
    rng,rows = np.random.default_rng(0),[]
    for i in range(32):
        a = rng.normal(100, 10, (48,44))
        a[(slice(5,15) if i%2 else slice(30,40)),10:30] += 80
        Image.fromarray(a.clip(0,255).astype(np.uint8)).save(tmp_path/f'{i}.png')
        rows.append(dict(image=f'{i}.png', label=['low','high'][i%2], patient=f'p{i//2}'))
    df = pd.DataFrame(rows)
    set_seed(0)
    dls = RadiographDataLoaders.from_df(df, tmp_path, group_col='patient', size=32, bs=8, cache=tmp_path, **QUIET)
    learn = quiet_fit(classifier_learner(dls, 'small_resnet', nf=8, path=tmp_path), 10, 5e-3)
    ev = learn.evaluate(tta=2)
    s = ev.summary(n_boot=20)
    assert s.loc['roc_auc','value']>.9 and set(ev.subject)<=set(df.patient) and s.subjects.iloc[0]==ev.subject.nunique()
    fn = tmp_path/'3.png'
    p = learn.predict(fn)[2]
    learn.export()
    save_model(learn, tmp_path/'m.safetensors')
    assert torch.equal(load_learner(tmp_path/'export.pkl').predict(fn)[2],
            p) and torch.equal(load_model(tmp_path/'m.safetensors', 'cpu').predict(fn)[2], p)
    assert torch.equal(learn.predict(load_radiograph(fn))[2], p) and len(learn.predict_folder(tmp_path, '*.png'))==32
    learn.show_results(max_n=2)
    learn.show_worst(2)
    Interpretation.from_learner(learn).plot_top_losses(2)
    learn.tta(n=2)
    r18 = quiet_fit(classifier_learner(dls, metrics=[]), 1)
    assert 'resnet18' in r18.arch and r18.predict(fn)[0] in ('low','high')

# ---- masks, measured

@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    "Forty masks of two plates that cross, every second with a ball on them, in a folder with a space and an umlaut"
    import nibabel as nib
    path = tmp_path_factory.mktemp('Nebenniere links ä')
    rows = []
    for i in range(40):
        rng = np.random.default_rng(i)
        g = np.stack(np.mgrid[:24,:24,:20], -1)-rng.uniform(9, 12, 3)
        x = ((abs(g[...,0])<=1.2)|(abs(g[...,1])<=1.2))&(abs(g)<rng.uniform(6, 9)).all(-1)
        if i%2: x |= ((g-rng.uniform(-2, 2, 3))**2).sum(-1)<=16
        nib.save(nib.Nifti1Image(x.astype(np.uint8), affine_of('LAS' if i%3 else 'RAS', (1,1,1))),
                 path/f'g {i:02}.nii.gz')
        rows.append(dict(case=f'g{i:02}', image=f'g {i:02}.nii.gz', ill=['no','yes'][i%2], cubic=float(x.sum())))
    return path,pd.DataFrame(rows)

def masks(shapes, label='ill', **kw):
    path,df = shapes
    return VolumeDataLoaders.from_df(df, path, **{'label_col':label, 'bs':8, 'cache':path/'cache', 'valid_pct':.3,
                                                  'normalize':'none', 'batch_tfms':[], **QUIET, **kw})

@pytest.fixture(scope='module')
def measured(shapes):
    set_seed(0)
    return quiet_fit(classifier_learner(masks(shapes), 'shape_net', path=shapes[0]), 20, 1e-2)

def test_shape_net_learns_and_answers_everywhere(measured, shapes, tmp_path):
    path,df = shapes
    ev = measured.evaluate()
    assert ev.summary(n_boot=20).loc['roc_auc','value']>.95 and (ev.status=='ok').all()
    fn = str(path/df.image[1])
    p = measured.predict(fn)[2]
    assert p[1]>.5
    measured.export(tmp_path/'e.pkl')
    save_model(measured, tmp_path/'m.safetensors')
    code = (f"from fastmed.all import *\nfor l in (load_learner({str(tmp_path/'e.pkl')!r}), "
            f"load_model({str(tmp_path/'m.safetensors')!r}, 'cpu')): print(l.predict({fn!r})[2].tolist())")
    assert [json.loads(o) for o in python(code, tmp_path).splitlines()[-2:]]==[p.tolist()]*2
    other = quiet_fit(classifier_learner(measured.dls, 'small_resnet', nf=4), 1)
    both = Ensemble([measured, other]).predict(fn)[2]
    assert torch.allclose(both, (p+other.predict(fn)[2])/2, atol=1e-6)
    # what is remembered changes nothing
    assert measured.predict(str(path/df.image[1]))[2].equal(p) and len(measured.model.known)>=40
    it = measured.interpret(n_boot=5)
    it.plot_curves()
    it.report(tmp_path/'r.html')
    with pytest.raises(InputError, match='has no convolution'): grad_cam(measured, fn)
    with pytest.raises(InputError, match='has no recognisable encoder'): measured.save_encoder(tmp_path/'enc')

def test_shape_net_refuses_what_is_no_mask(shapes, cases):
    for dls in (masks(shapes, normalize='zscore'), loaders(cases, normalize='none')):
        with pytest.raises(InputError, match='expected masks of 0 and 1'):
            quiet_fit(classifier_learner(dls, 'shape_net'))
    with pytest.raises(InputError, match='expected volumes'):
        classifier_learner(loaders(cases, SliceDataLoaders, axis=2), 'shape_net')
    with pytest.raises(ArgumentError, match='nf'): classifier_learner(masks(shapes), 'shape_net', nf=4)

def test_shape_net_regresses_and_repeats(shapes):
    "Volume from the measures, the same bits with workers as without"
    def run(**kw):
        set_seed(0)
        return quiet_fit(regression_learner(masks(shapes, 'cubic', **kw), 'shape_net'), 15, 1e-2)
    a,b = run(),run(num_workers=2)
    assert a.evaluate().pred.tolist()==b.evaluate().pred.tolist()
    ev = a.evaluate()
    assert np.corrcoef(ev.target, ev.pred)[0,1]>.9

@pytest.mark.parametrize('shape', [(1,1,1), (2,9,3), (40,3,3)])
def test_shape_measures_of_odd_masks(shape):
    m = np.ones(shape, bool)
    s = shape_measures(m)
    assert np.isfinite(list(s.values())).all() and math.isclose(s['volume'],
            np.log(m.size)) and s['fill across axis 0, mean']==1
    apart = np.zeros((9,9,9), bool)
    apart[0,0,0] = apart[8,8,8] = True
    t = shape_measures(apart)
    assert t.keys()==s.keys() and np.isfinite(list(t.values())).all() and t['extent of axis 2']==9

def test_command_line_answers_for_cases(measured, shapes, tmp_path, capsys):
    from fastmed.cli import main
    path,df = shapes
    save_model(measured, tmp_path/'m ü.safetensors')
    measured.export(tmp_path/'m.pkl')
    want = measured.predict_folder(path)
    (path/'broken.nii.gz').write_bytes(b'no scan')
    try:
        assert main(['predict', str(tmp_path/'m ü.safetensors'), str(path),
                str(tmp_path/'out')])==1 and 'broken.nii.gz: error' in capsys.readouterr().err
    finally: (path/'broken.nii.gz').unlink()
    t = pd.read_csv(tmp_path/'out'/'answers.csv')
    assert len(t)==41 and (t.status!='ok').sum()==1
    t = t[t.status=='ok'].reset_index(drop=True)
    assert t.case.tolist()==want.case.tolist() and np.allclose(t.prob_yes, want.prob_yes)
    assert main(['predict', str(tmp_path/'m.pkl'), str(path/df.image[3]), str(tmp_path/'one.csv'),
            '--trust'])==0 and pd.read_csv(tmp_path/'one.csv').prob_yes.tolist()==t.prob_yes[t.case
                                           ==df.image[3]].tolist()
    for words in (['predict', '--post', 'fill_holes'], ['predict', '--overlap', '.2'], ['evaluate']):
        capsys.readouterr()
        assert main([words[0], str(tmp_path/'m ü.safetensors'), str(path),
                *([str(tmp_path/'x')] if words[0]=='predict' else []), *words[1:]])==2
        err = capsys.readouterr().err
        assert 'predicts labels of cases' in err and not (tmp_path/'x').exists()

@pytest.mark.parametrize('cell', ('x|q', 'x,y', None))
def test_findings_that_nobody_knows_are_errors(cell, tmp_path):
    "They counted as not there: the target was 0, and the status ok"
    df = pd.DataFrame([write_case(tmp_path, f'c{i}', seed=i) for i in range(4)])
    df = df.assign(finds=['x|y','x','','y'], v=[0,0,0,1])
    dls = VolumeDataLoaders.from_df(df, tmp_path, label_col='finds', label_delim='|', valid_col='v', size=16,
                                    cache=tmp_path/'s', **QUIET)
    learn = classifier_learner(dls, 'small_resnet')
    res = learn.evaluate(df.assign(finds=['x|y','x','',cell]))
    assert res.status[3].startswith("error: case 'c3'") and (res.status[:3]=='ok').all()
    assert res.target_x[:3].tolist()==[1,1,0]
