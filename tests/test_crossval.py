"Cross-validation: killed and started again, processes, leaks, labels, luck."
import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import CODES, dies

from fastmed.all import CrossValidation, Ensemble, VolumeDataLoaders, cross_validate, load_mask, unet3d_learner
from fastmed.study.crossval import stratified_folds

ARGS = dict(codes=CODES, ndim=3, budget=dict(updates=4), nf=4, depth=2, bs=2, samples_per_case=2, patch=16,
            spacing=1.25, device='cpu')

@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def cases(study):
    path,df = study
    return df.assign(image=[str(path/o) for o in df.image], mask=[str(path/o) for o in df['mask']])

def train(df, cache=None, **kwargs):
    "A function as a person writes it; processes find it by its name"
    dls = VolumeDataLoaders.from_df(df, valid_col='is_valid', codes=CODES, patch=16, bs=2, samples_per_case=2,
            spacing=1.25, device='cpu', cache=cache or os.environ['CV_CACHE'], **kwargs)
    learn = unet3d_learner(dls, nf=4, depth=2)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2)
    return learn

def make(study, tmp, **kwargs):
    return cross_validate(cases(study), folds=2, repeats=2, path=Path(tmp)/'cv', cache=Path(tmp)/'s',
                          **{**ARGS, **kwargs})
def table(c): return c.results.sort_values(['repeat','fold','case','structure']).reset_index(drop=True)

@pytest.fixture(scope='module')
def whole(study, tmp_path_factory):
    "A cross-validation that was never stopped"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    c = make(study, tmp_path_factory.mktemp('whole'))
    torch.set_num_threads(n)
    return c

def test_every_case_once_a_repeat_by_a_model_that_does_not_know_it(whole, study):
    t,df = whole.results,cases(study)
    assert len(t)==2*8*2 and (t.groupby(['repeat','case']).fold.nunique()==1).all() and set(t.case)==set(df.case) and (
            whole.plan.done).all()
    for r in (0,1):
        for c in df.case:
            l = whole.learner(c, r)
            assert c not in l.seen and df.set_index('case').subject[c] not in l.seen.values()
    r = whole.predictions.iloc[5]
    assert np.array_equal(load_mask(r['mask']).numpy(),
            whole.learner(r.case, r['repeat']).predict_volume(df.set_index('case').image[r.case]).numpy())
    e = whole.ensemble()
    assert isinstance(e, Ensemble) and len(e)==4 and len(whole.ensemble(repeat=1,
            lazy=True))==2 and sorted(e.saw(df))==sorted(df.case)
    assert not np.array_equal(whole.fold[0],
                              whole.fold[
            1]) and 'single split' in whole.answer() and 'repeats lie between' in whole.answer()

@pytest.mark.slow
def test_killed_and_started_again(study, whole, tmp_path):
    """SIGKILL in the middle of the first and of the second fold, each time started again: the same table, and nothing
    trained twice"""
    code = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from test_crossval import make
import pandas as pd
make((Path(sys.argv[3]), pd.read_csv(sys.argv[3]+'/cases.csv')), sys.argv[1])
"""
    env = {**os.environ,
           'PYTHONPATH':os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent),
           *filter(None, [os.environ.get('PYTHONPATH')])]), 'PYTHONWARNINGS':'ignore'}
    for n in (0,1):
        (tmp_path/'run.py').write_text(dies(f"self.training and self.train_iter=={1+2*n} and "
                                            f"len(list(Path({str(tmp_path)!r}).glob('cv/repeat*')))=={n}")+code)
        p = forked.run([tmp_path/'run.py', tmp_path, Path(__file__).parent, study[0]], tmp_path, env)
        assert p.returncode==-signal.SIGKILL, p.stderr[-2000:]
        assert len(list(tmp_path.glob('cv/repeat*')))==n and (tmp_path/'cv'/'unfinished').exists()
    stamps = {f:f.stat().st_mtime_ns for f in tmp_path.glob('cv/repeat*/results.csv')}
    assert len(stamps)==1
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    c = make(study, tmp_path)
    torch.set_num_threads(n)
    pd.testing.assert_frame_equal(table(c), table(whole))
    assert all(f.stat().st_mtime_ns==t for f,t in stamps.items()) and not (tmp_path/'cv'/'unfinished').exists()

def copied(study, runs, tmp_path):
    "Finished runs and files in another place: the cases"
    path,df = study
    shutil.copytree(runs, tmp_path/'cv')
    for f in [*df.image, *df['mask']]:
        (tmp_path/'data'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path/f, tmp_path/'data'/f)
    return tmp_path/'data',df

def test_finished_folds_do_not_stand_for_a_corrected_file(study, whole, tmp_path):
    there = copied(study, whole.path, tmp_path)
    pd.testing.assert_frame_equal(table(make(there, tmp_path)), table(whole))
    for col in ('image','mask'): (there[0]/there[1][col][1]).write_bytes((there[0]/there[1][col][3]).read_bytes())
    with pytest.raises(ValueError, match='4 runs were .* evaluated with other content') as e: make(there, tmp_path)
    assert f"{there[1].case[1]!r} (image, mask). To train again" in str(e.value)

def test_a_model_of_another_fold_joins_no_ensemble(study, whole, tmp_path):
    there = copied(study, whole.path, tmp_path)
    a,b = tmp_path/'cv'/'repeat 0, fold 0',tmp_path/'cv'/'repeat 0, fold 1'
    (a/'model.safetensors').write_bytes((b/'model.safetensors').read_bytes())
    c = make(there, tmp_path)
    for ask in (lambda: c.ensemble(), lambda: c.ensemble(lazy=True)):
        with pytest.raises(ValueError, match='model.safetensors: is not what this run wrote'): ask()

def test_folds_say_what_they_were_told(study, whole, tmp_path):
    "Where the notes of the study are lost"
    there = copied(study, whole.path, tmp_path)
    (tmp_path/'cv'/'crossval.json').unlink()
    with pytest.raises(ValueError, match='belongs to another cross-validation: seed was 0, is 1'):
        make(there, tmp_path, seed=1).summary()

def test_folds_that_noted_no_content_open_with_a_word(study, whole, tmp_path):
    there = copied(study, whole.path, tmp_path)
    for f in [tmp_path/'cv'/'crossval.json', *(tmp_path/'cv').glob('*/run.json')]:
        facts = json.loads(f.read_text())
        assert facts.pop('files')
        for k in ('sums','seal'): facts.pop(k, None)
        f.write_text(json.dumps(facts))
    for _ in range(2):
        with pytest.warns(UserWarning, match='4 of 4 finished runs are of a version that did not store'):
            make(there, tmp_path)
    (there[0]/there[1]['mask'][1]).write_bytes((there[0]/there[1]['mask'][3]).read_bytes())
    with pytest.raises(ValueError, match='other content'): make(there, tmp_path)

def test_a_label_or_a_file_of_a_function_is_content_too(tmp_path):
    fns = [tmp_path/f'{i}.nii' for i in range(4)]
    for i,f in enumerate(fns): f.write_bytes(bytes([i]))
    df = pd.DataFrame(dict(case=list('abcd'), t2=[str(f) for f in fns], age=[50,60,70,80]))
    def run(df, **kw):
        c = CrossValidation(df, 2, path=tmp_path/('f' if 'fit' in kw else 'l'), **kw)
        for r in c.plan.itertuples():
            (fn := c._folder(r.repeat, r.fold)).mkdir(exist_ok=True)                     # as if trained
            (fn/'run.json').write_text(json.dumps(dict(files=c.files)))
    kinds = dict(fit=train), dict(image_col='t2', label_col='age')
    for kw in kinds: run(df, **kw)
    run(df, **kinds[1])
    with pytest.raises(ValueError, match=r"other content of case 'c' \(age\)"):
        run(df.assign(age=[50,60,71,80]), **kinds[1])
    fns[3].write_bytes(b'other')
    for kw in kinds:
        with pytest.raises(ValueError, match=r"other content of case 'd' \(t2\)"): run(df, **kw)

@pytest.mark.slow
def test_processes_and_functions_give_the_same_table(study, tmp_path, one_thread, monkeypatch):
    monkeypatch.setenv('CV_CACHE', str(tmp_path/'s'))
    kw = dict(folds=2, group_col='subject', fit=train)
    a = cross_validate(cases(study), path=tmp_path/'a', **kw)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('spawn')) as ex:
        b = cross_validate(cases(study), path=tmp_path/'b', executor=ex, **kw)
    pd.testing.assert_frame_equal(table(a), table(b))
    assert a.budget is None and (a.cost.train_s>0).all()

def test_a_leak_is_found_out(study, tmp_path, one_thread):
    df = cases(study)
    cv = lambda f, n: cross_validate(df, folds=2, fit=f, path=tmp_path/n)
    swapped = lambda d: train(d.assign(is_valid=~d.is_valid), tmp_path/'s')
    with pytest.raises(ValueError, match='trains on 4 of the 4 cases'): cv(swapped, 'a')
    fewer = lambda d: train(d[~(d.is_valid & (d.case==d.case[d.is_valid].iloc[0]))].reset_index(drop=True),
                            tmp_path/'s')
    with pytest.raises(ValueError, match='holds out 3 cases.*not the 4'): cv(fewer, 'b')
    def before(d):
        l = train(d, tmp_path/'s')
        l.seen = {**l.seen, 'c0':'s0', 'c2':'s1', 'c4':'s2', 'c6':'s3'}
        return l
    with pytest.raises(ValueError, match='trained before on'): cv(before, 'c')
    with pytest.raises(TypeError, match='return learn'): cv(lambda d: None, 'd')
    with pytest.raises(ValueError, match='several folds'):
        cross_validate(df.assign(f=[i%2 for i in range(8)]), folds='f', path=tmp_path/'e', **ARGS)
    assert not list(tmp_path.glob('*/repeat*'))

def test_a_lucky_split_is_seen_as_one():
    """Of pure noise the splits scatter, the interval over subjects does not pretend otherwise, and more repeats do not
    narrow it"""
    import json
    import tempfile

    from fastmed.all import CrossValidation
    tmp = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    n = 40
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(n)], subject=[f's{i//2}' for i in range(n)]))
    hard = .8+.05*rng.normal(size=20)[np.arange(n)//2]
    def filled(repeats):
        cv = CrossValidation(df, folds=5, repeats=repeats, fit=train, path=tmp/f'{repeats}')
        for r,f in enumerate(cv.fold):
            for k in range(5):
                (d:=cv._folder(r, k)).mkdir(parents=True)
                c = df[f==k]
                c.assign(repeat=r, fold=k, structure='organ', dice=hard[f==k]+.01*rng.normal(size=len(c)), hd95=1.,
                        nsd=1., volume_mm3=1., target_mm3=1., status='ok').to_csv(d/'results.csv', index=False)
                (d/'run.json').write_text(json.dumps(dict(repeat=r, fold=k, task='segmentation', vocab=['b','organ'],
                        cost={}, settings={})))
        return cv
    one,ten = filled(1),filled(10)
    a,b = [c.summary().loc['all'] for c in (one,ten)]
    assert (a.repeat_low==a.repeat_high and a.split_high-a.split_low>.02 and b.repeat_high-b.repeat_low<b.high-b.low
            and 'repeats=1' in one.answer())
    assert (b.high-b.low)>.6*(a.high-a.low) and b.split_high-b.split_low>=a.split_high-a.split_low and len(
            ten.splits())==50 and (a.n, a.subjects)==(40,20)

def test_folds_are_balanced_and_grouped():
    rng = np.random.default_rng(1)
    df = pd.DataFrame(dict(case=[f'c{i:03}' for i in range(150)], subject=rng.integers(50, size=150),
                                 y=rng.random(150)<.15, age=rng.normal(50, 9, 150)))
    f = stratified_folds(df, ['y','age'], 5)
    assert all(len(set(f[df.subject==s]))==1 for s in set(df.subject)) and len(set(f))==5
    assert df.y.groupby(f).mean().std()<.06 and np.array_equal(f,
            stratified_folds(df, ['y','age'], 5)) and not np.array_equal(f,
            stratified_folds(df, ['y','age'], 5, seed=1))

@pytest.mark.parametrize('names', [('01','02'), (0,1), ('None','NA'), (False,True)])
def test_classes_come_back_as_they_were_written(tmp_path, names):
    "'01' came back as 1, and 1 as 1.0 where one case could not be read: no answer was right any more, accuracy 0"
    from fastmed.all import CrossValidation
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(8)], subject=[f's{i}' for i in range(8)],
            fold=[i%2 for i in range(8)]))
    def fit(d): pass
    cv = CrossValidation(df, fit=fit, folds='fold', path=tmp_path)
    for k in (0,1):
        t = pd.DataFrame([dict(repeat=0, fold=k, case=f'c{i}', subject=f's{i}', target=names[i//2%2],
                               pred=names[i//2%2], status='ok',
                               **{f'prob_{v}':float(names[i//2%2]==v) for v in names}) for i in range(k, 8, 2)])
        t = t.astype(dict(target=object, pred=object))
        if not k: t.loc[0,['target','pred',*[f'prob_{v}' for v in names]]] = np.nan
        if not k: t.loc[0,'status'] = 'error: gone'
        # as a column of numbers with a gap is
        if names[1] is not True and names==(0,1):
            t = t.astype(dict(target=float, pred=float))
        (f:=cv._folder(0, k)).mkdir(parents=True)
        t.to_csv(f/'results.csv', index=False)
        (f/'run.json').write_text(json.dumps(dict(task='category', vocab=list(names), folds=cv.hash[0], files=cv.files,
                                                  cost={}, settings={}, repeat=0, fold=k), default=str))
    t = cv.summary()
    assert (t.loc[['accuracy','roc_auc'],'mean']==1).all() and (t.failed==1).all()
    assert set(cv.results.target.dropna())==set(names)

def three_classes(own, rng):
    y = [int(o[1:])%3 for o in own.case]
    p = rng.random((len(own),3))+np.eye(3)[y]*.5
    p /= p.sum(1, keepdims=True)
    return dict(target=y, pred=p.argmax(1), **{f'prob_{i}':p[:,i] for i in range(3)})

def one_number(own, rng):
    y = np.array([float(o[1:]) for o in own.case])
    return dict(target=y, pred=y+rng.normal(size=len(y)))

@pytest.mark.parametrize('task,vocab,columns,score,found', [
    ('category', [0,1,2], three_classes, 'roc_auc', (.924479166667,.844791027906,.971544773094)),
    ('category', [0,1,2], three_classes, 'average_precision', (.878590969216,.788444033395,.959039408514)),
    ('category', [0,1,2], three_classes, 'accuracy', (.75,.550440802299,.878991471716)),
    ('regression', ['v'], one_number, 'mae', (.705318860201,.463719208610,.946918511791)),
    ('regression', ['v'], one_number, 'r2', (.984328624934,.941988665684,.994313899623))])
def test_numbers_of_labels_stay(tmp_path, task, vocab, columns, score, found):
    "The mean to the digit, as version 0.1.0 gave it, within an interval of few subjects; and each table is read once"
    df = pd.DataFrame(dict(case=[f'c{i}' for i in range(24)], subject=[f's{i//2}' for i in range(24)]))
    cv = CrossValidation(df, 3, 2, fit=train, path=tmp_path)
    for r,k in [(r, k) for r in range(2) for k in range(3)]:
        (d:=cv._folder(r, k)).mkdir()
        own = df[cv.fold[r]==k]
        own.assign(repeat=r, fold=k, **columns(own, np.random.default_rng(10*r+k)), status='ok').to_csv(
            d/'results.csv', index=False)
        (d/'run.json').write_text(json.dumps(dict(repeat=r, fold=k, task=task, vocab=vocab, cost={}, settings={},
                                                  files=cv.files)))
    r = cv.summary(n_boot=200).loc[score]
    assert (r['mean'], r.low, r.high)==pytest.approx(found, abs=1e-11)

def test_a_report_reads_each_fold_once(whole, study, tmp_path, monkeypatch):
    c,read = CrossValidation(cases(study), 2, 2, path=whole.path, cache=tmp_path, **ARGS),[]
    own = pd.read_csv
    monkeypatch.setattr(pd, 'read_csv', lambda *args, **kwargs: (read.append(1), own(*args, **kwargs))[1])
    c.report(tmp_path/'r.html')
    assert len(read)==len(c.plan)
