"The command line: what it refuses before any work, what it prints where, what it opens, and how it stops."
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import nibabel as nib
import numpy as np
import pytest
from test_nothing_lost import correct, snapshot, write_gz

from fastmed.all import Plan, ResumeCallback, save_model
from fastmed.cli import main
from fastmed.core import FileError
from fastmed.learn.fingerprint import read_state

root = Path(__file__).resolve().parent.parent
ENV = {**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')])),
       'PYTHONWARNINGS':'ignore', 'OMP_NUM_THREADS':'1'}

@pytest.fixture
def shell(capsys):
    "`shell(words…)` gives exit code, stdout, stderr"
    def run(*words):
        capsys.readouterr()
        try: code = main([str(o) for o in words])
        except SystemExit as e: code = e.code
        return code,*capsys.readouterr()
    return run

@pytest.fixture
def process(tmp_path_factory):
    "`process(words…)` runs the command in a process that has imported fastmed; `stderr`: a descriptor"
    tmp = tmp_path_factory.mktemp('process')
    (tmp/'run.py').write_text('import sys; from fastmed.cli import main; sys.exit(main())')
    def run(*words, **streams): return forked.run([tmp/'run.py', *words], tmp, ENV, **streams)
    return run

@pytest.fixture
def model(learner, tmp_path): return save_model(learner(3), tmp_path/'m.safetensors')

@pytest.mark.parametrize('words,says', [
    ('train D --epochs -3', 'epochs'), ('train D --epochs 0', 'epochs'), ('train D --epochs 1.5', 'epochs'),
        ('train D --epochs 1 --minutes 3', 'not allowed with argument'),
        ('train D --minutes 10 --epochs 1', 'not allowed with argument'), ('train D --minutes 0', 'minutes'),
        ('train D --minutes nan', 'minutes'), ('train D --spacing 1 2', 'spacing'), ('train D --spacing 0', 'spacing'),
    ('train D --spacing 1 1 1 1', 'spacing'), ('train D --codes bg,,x', 'codes'), ('train D --codes bg,x,x', 'codes'),
        ('train D --codes lesion=1,background=0', 'names only'), ('train D --workers -1', 'workers'),
        ('train D --valid-pct 1', 'valid-pct'), ('train D --seed -1', 'seed'),
    ('predict M D O --overlap 1', 'overlap'), ('predict M D O --overlap -.1', 'overlap'),
        ('evaluate M D --tolerance -1', 'tolerance'), ('evaluate M D --tolerance inf', 'tolerance'),
        ('check D --codes ,', 'codes')])
def test_an_argument_out_of_range_is_named(shell, study, tmp_path, words, says):
    "In one line, before anything is read or written"
    at = dict(D=study[0], M=tmp_path/'m.safetensors', O=tmp_path/'o')
    code,out,err = shell(*[at.get(o, o) for o in words.split()])
    assert code==2 and says in err and err.count('\n')==1 and not out and not list(tmp_path.iterdir())

@pytest.mark.parametrize('out', ['model','m.onnx','m.pt','m.nii.gz'])
def test_train_knows_the_name_of_its_model_before_it_trains(shell, study, tmp_path, out, monkeypatch):
    import fastmed.all
    # whoever gets so far fails otherwise
    monkeypatch.setattr(fastmed.all, 'unet3d_learner', None)
    code,_,err = shell('train', study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--out', tmp_path/out,
                       '--epochs', 1, '--cache', tmp_path/'s')
    assert code==2 and f'{out}: expected a name that ends in .safetensors, .pkl' in err and not list(tmp_path.iterdir())

def test_train_replaces_no_model_unasked(shell, study, tmp_path):
    (tmp_path/'m.safetensors').write_text('of another day')
    code,_,err = shell('train', study[0], '--out', tmp_path/'m.safetensors')
    assert code==2 and '--overwrite' in err and (tmp_path/'m.safetensors').read_text()=='of another day'

class TestPredict:
    @pytest.fixture
    def scans(self, study, tmp_path):
        write_gz(study[0], tmp_path/'images')
        return tmp_path/'images'

    def test_a_source_is_never_replaced(self, shell, model, scans):
        was = snapshot(scans)
        for dst,src in ((scans,scans), (scans/'c0.nii.gz',scans/'c0.nii.gz'), (scans,scans/'c0.nii.gz')):
            for more in ([], ['--overwrite']):
                code,out,err = shell('predict', model, src, dst, *more)
                assert code==2 and 'never replaces' in err and not out
        assert snapshot(scans)==was

    def test_what_was_not_written_by_fastmed_is_kept(self, shell, model, scans, study, tmp_path):
        truth = tmp_path/'c0.nii.gz'
        nib.save(nib.load(study[0]/'labels/c0.nii'), truth)
        was = truth.read_bytes()
        code,out,err = shell('predict', model, scans/'c0.nii.gz', truth)
        assert code==2 and '--overwrite' in err and truth.read_bytes()==was
        code,out,err = shell('predict', model, scans, tmp_path)
        assert code==2 and '--overwrite' in err and truth.read_bytes()==was
        code,out,err = shell('predict', model, scans/'c0.nii.gz', truth, '--overwrite')
        assert code==0 and out==f'{truth}\n' and truth.read_bytes()!=was
        assert shell('predict', model, scans/'c0.nii.gz', truth)[0]==0                     # its own: once more
        a = correct(truth)
        assert shell('predict', model, scans/'c0.nii.gz',
                     truth)[0]==2 and np.array_equal(np.asarray(nib.load(truth).dataobj), a)

    def test_a_wrong_destination_is_found_before_the_prediction(self, shell, model, scans, tmp_path, monkeypatch):
        from fastmed.all import VolumeLearner
        monkeypatch.setattr(VolumeLearner, 'predict_volume', None)
        (tmp_path/'file').write_text('')
        for dst,says in (('o.pkl','.nii.gz'), ('o','no ending'), ('file/o.nii.gz','is where a folder should be'),
                ('cases.csv','.nii.gz')):
            code,_,err = shell('predict', model, scans/'c0.nii.gz', tmp_path/dst)
            assert code==2 and says in err, err
        code,_,err = shell('predict', model, scans, tmp_path/'file')
        assert code==2 and 'is where a folder should be' in err

    def test_stdout_holds_paths_alone(self, process, model, scans, tmp_path):
        r = process('predict', model, scans, tmp_path/'o')
        assert r.returncode==0 and r.stdout==''.join(f'{tmp_path/"o"/f"c{i}.nii.gz"}\n'
                                                     for i in range(2)) and r.stderr=='', (r.stdout, r.stderr)

def test_a_table_is_not_replaced_unasked(shell, model, study, tmp_path):
    (tmp_path/'cases.csv').write_text('case,subject\n')
    words = ['evaluate', model, study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--csv',
             tmp_path/'cases.csv']
    code,_,err = shell(*words)
    assert code==2 and '--overwrite' in err and (tmp_path/'cases.csv').read_text()=='case,subject\n'
    code,_,err = shell(*words[:-1], tmp_path/'cases.nii.gz')
    assert code==2 and '.csv' in err
    assert shell(*words, '--overwrite')[0]==0 and 'dice' in (tmp_path/'cases.csv').read_text()

class TestPickle:
    @pytest.mark.parametrize('name', ['m.pkl','m','m.pth','m.SAFE'])
    def test_a_pickle_is_not_run_unasked(self, shell, learner, study, tmp_path, name):
        "Whatever its name; what runs leaves a file behind"
        (tmp_path/name).write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path/'ran').encode())
        for words in (['predict', tmp_path/name, study[0]/'images/c0.nii', tmp_path/'o.nii.gz'],
                ['evaluate', tmp_path/name, study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii']):
            code,_,err = shell(*words)
            assert code==2 and '--trust' in err and not (tmp_path/'ran').exists()

    def test_a_trusted_one_is_opened_with_a_sentence(self, shell, learner, study, tmp_path):
        learner(3).export('m.pkl')
        code,out,err = shell('predict', tmp_path/'m.pkl', study[0]/'images/c0.nii', tmp_path/'o.nii.gz', '--trust')
        assert code==0 and 'pickle' in err and out==f'{tmp_path/"o.nii.gz"}\n'

def test_train_writes_safetensors_where_nothing_is_said():
    from fastmed.cli import parser
    assert parser().parse_args(['train', 'x']).out=='model.safetensors'

def test_epochs_of_a_fit_by_the_clock_are_not_a_million(process, study, tmp_path):
    "Under a terminal of its own: bars on stderr, no number of epochs that nobody knows"
    pty = pytest.importorskip('pty')
    end,other = pty.openpty()
    parts = []
    def read():
        try:
            while b:=os.read(end, 2**16): parts.append(b)
        except OSError: pass                                                               # the other end is closed
    reader = threading.Thread(target=read)
    reader.start()
    try:
        p = process('train', study[0], *words_of(study), '--spacing', 2.5, '--minutes', .02, '--out',
                    tmp_path/'m.safetensors', '--cache', tmp_path/'s', stderr=other)
    finally:
        os.close(other)
        reader.join()
        os.close(end)
    seen,out = b''.join(parts),p.stdout
    seen = seen.decode(errors='replace')
    assert p.returncode==0, seen[-2000:]
    assert '1000000' not in seen+out and 'None' not in seen.replace('\r',
            '\n').splitlines()[-1] and re.search(r'of 0\.02 minutes, \d+ updates', seen), seen[:500]
    assert '█' not in out and '\r' not in out and out.rstrip().endswith('m.safetensors written')

def test_a_refused_comparison_does_not_stand_in_the_way_of_the_corrected_one(shell, study, tmp_path):
    plan = (f"data = '{study[0]}'\nimages = 'images/*.nii'\nmasks = 'labels/*.nii'\nfolds = 2\nbudget = {{{{updates = "
            f"1}}}}\ndevice = 'cpu'\nnf = 4\ndepth = 2\npatch = 16\nspacing = 1.25\ncodes = "
            f"['background','large','small']\n[arms.3D]\nndim = 3\n{{}}\n[arms.small]\nndim = 3\nnf = 2\n")
    (tmp_path/'plan.toml').write_text(plan.format('nosuch = 1'))
    code,_,err = shell('compare', tmp_path/'plan.toml')
    assert code==2 and 'nosuch' in err
    (tmp_path/'plan.toml').write_text(plan.format(''))
    code,_,err = shell('compare', tmp_path/'plan.toml')
    assert code==0, err
    # of finished runs it still is
    (tmp_path/'plan.toml').write_text(plan.format('lr_max = 1'))
    code,_,err = shell('compare', tmp_path/'plan.toml')
    assert code==2 and 'another experiment' in err

@pytest.mark.skipif(sys.platform=='win32', reason='signals of POSIX')
@pytest.mark.parametrize('after', [0., .3, .7, 1.1, 1.5, 2.5])
def test_stopped_at_the_start(study, after):
    "Ctrl-C while modules are imported, which some of them turn into errors of their own: one line and no traceback"
    code = "import sys, fastmed.cli; print('up', flush=True); sys.exit(fastmed.cli.main())"
    p = subprocess.Popen([sys.executable, '-c', code, 'check', study[0], '--images', 'images/*.nii', '--masks',
                          'labels/*.nii'], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert p.stdout.readline()=='up\n'
    time.sleep(.05+after)
    p.send_signal(signal.SIGINT)
    out,err = p.communicate(timeout=1200)
    assert (p.returncode, err)==(130, 'fastmed: stopped\n') or p.returncode in (0,1) and not err, err

def test_a_training_that_goes_on_keeps_its_plan(shell, study, tmp_path, monkeypatch):
    "The machine is measured once; another spacing is refused, and the finished model leaves no plan behind"
    import fastmed.all
    import fastmed.data.loaders as data
    words = ['train', study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--out',
             tmp_path/'m.safetensors',
             '--minutes', .05, '--cache', tmp_path/'s', '--workers', 0]
    class Stop(ResumeCallback):
        def after_batch(self):
            super().after_batch()
            if self.iter==1:
                self._save(0, 2)
                raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(fastmed.all, 'ResumeCallback', Stop)
        assert shell(*words)[0]
    kept = tmp_path/'m.safetensors.plan.json'
    plan = Plan.from_json(kept.read_text())
    assert any('measured' in o or 'minutes' in o for o in map(str, plan.reasons)), plan.reasons
    monkeypatch.setattr(data, 'suggest_plan', lambda *a, **k: pytest.fail('a plan was made a second time'))
    code,_,err = shell(*words, '--resume', '--spacing', 3)
    assert code==2 and '--spacing' in err and '3.0' in err and kept.exists()
    code,out,_ = shell(*words, '--resume')
    assert not code and 'goes on' in out and (tmp_path/'m.safetensors').exists() and not kept.exists()

def test_the_same_words_again_lose_no_training(shell, study, tmp_path):
    "A training that was stopped is not thrown away because --resume was forgotten"
    words = ['train', study[0], '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--out',
             tmp_path/'m.safetensors', '--epochs', 1, '--cache', tmp_path/'s']
    kept,plan = tmp_path/'m.safetensors.resume',tmp_path/'m.safetensors.plan.json'
    kept.write_bytes(b'three days')
    plan.write_text('its plan')
    code,_,err = shell(*words)
    assert code==2 and '--resume' in err and '--overwrite' in err and err.count('\n')==1
    assert kept.read_bytes()==b'three days' and plan.read_text()=='its plan'

def words_of(study, *more): return ['--images', 'images/*.nii', '--masks', 'labels/*.nii', *more]

@pytest.fixture
def cases(study, tmp_path):
    "A data set of its own, which a test may harm"
    shutil.copytree(study[0], tmp_path/'d')
    return tmp_path/'d'

class TestKept:
    def test_a_table_of_cases_is_a_source(self, shell, model, cases):
        (cases/'cases.csv').write_text('case,subject\n'+''.join(f'c{i},s{i}\n' for i in range(9)))
        was = snapshot(cases)
        code,out,err = shell('evaluate', model, cases, *words_of(cases, '--csv', cases/'cases.csv', '--overwrite'))
        assert code==2 and not out and 'never replaces' in err and snapshot(cases)==was

    @pytest.mark.parametrize('more', [[], ['--resume']])
    def test_a_training_that_was_stopped_is_not_lost(self, shell, study, tmp_path, monkeypatch, more):
        "It is removed where that is asked for; a link in its place is never followed"
        import fastmed.all
        # whoever gets so far fails otherwise
        monkeypatch.setattr(fastmed.all, 'unet3d_learner', None)
        kept,plan,other = [tmp_path/o for o in ('m.safetensors.resume','m.safetensors.plan.json','other')]
        words = ['train', study[0], *words_of(study, '--out', tmp_path/'m.safetensors', '--epochs', 1, '--cache',
                                              tmp_path/'s')]
        other.write_text('mine')
        if more:
            os.symlink(other, plan)
            os.mkfifo(kept)
            says = 'expected a file'
        else:
            kept.write_text('days')
            plan.write_text('{}')
            says = '--resume'
        code,_,err = shell(*words, *more)
        assert code==2 and says in err and os.path.lexists(kept) and os.path.lexists(plan) and other.read_text()=='mine'
        if not more: assert kept.read_text()=='days' and plan.read_text()=='{}'

    def test_two_trainings_of_one_name(self, shell, study, tmp_path, monkeypatch):
        "The second keeps what it has learnt, and the first its model"
        import fastmed.learn.learner as learner
        out,was = tmp_path/'m.safetensors',learner.VolumeLearner.fit
        def fit(self, *args, **kwargs):
            was(self, *args, **kwargs)
            out.write_text('of the other one')
        monkeypatch.setattr(learner.VolumeLearner, 'fit', fit)
        code,_,err = shell('train', study[0], *words_of(study, '--out', out, '--epochs', 1, '--spacing', 2, '--cache',
                                                        tmp_path/'s', '--workers', 0))
        assert code==2 and 'somebody else' in err and out.read_text()=='of the other one' and (tmp_path
                /'m.safetensors.resume').exists()

    def test_a_demonstration_over_files_of_somebody(self, shell, tmp_path):
        (tmp_path/'cases.csv').write_text('mine')
        was = snapshot(tmp_path)
        code,out,err = shell('demo', '--path', tmp_path, '--n', 2)
        assert code==2 and not out and '--overwrite' in err and snapshot(tmp_path)==was

    def test_a_report_is_no_scan(self, shell, cases, tmp_path):
        (tmp_path/'plan.toml').write_text('data = "d"\nimages = "images/*.nii"\nmasks = "labels/*.nii"\nreport = '
                                          '"d/images/c0.nii"\n[arms.a]\nndim = 3\n')
        was = snapshot(cases)
        code,_,err = shell('compare', tmp_path/'plan.toml')
        assert code==2 and '.html' in err and snapshot(cases)==was and not (tmp_path/'comparison').exists()

    def test_what_is_no_scan_never_replaces_one(self, learner, cases):
        "By whichever door"
        from fastmed.all import load_mask
        from fastmed.plot import html_report
        learn,fn,was = learner(3),cases/'images/c0.nii',snapshot(cases)
        for write in (lambda: save_model(learn, fn), lambda: html_report(fn, 't', 'a', {}),
                lambda: learn.predict_volume(fn).save(fn)):
            with pytest.raises(OSError, match='c0.nii: is '): write()
        assert snapshot(cases)==was
        load_mask(cases/'labels/c0.nii').save(cases/'labels/c0.nii')                       # a mask that was repaired
        learn.predict_volume(fn).save(cases/'labels/c0.nii')

class TestNames:
    @pytest.mark.skipif(sys.platform!='linux', reason='names of bytes')
    def test_bytes_that_are_no_letters(self, shell, model, cases, tmp_path):
        "The case is predicted, checked and scored like any other"
        for d in ('images','labels'): os.rename(cases/d/'c0.nii', os.fsencode(cases/d)+b'/by\xff.nii')
        code,out,err = shell('predict', model, cases/'images', tmp_path/'o', '--images', '*.nii')
        assert code==0, err
        assert (tmp_path/'o/by\\xff.nii.gz').exists() and len(out.splitlines())==len(
                list((tmp_path/'o').iterdir()))==len(list((cases/'images').iterdir()))
        code,_,err = shell('check', cases, *words_of(cases))
        assert code in (0,1) and not err
        code,_,err = shell('evaluate', model, cases, *words_of(cases, '--csv', tmp_path/'e.csv'))
        assert code==0 and r'by\xff' in (tmp_path/'e.csv').read_text(), err

    def test_a_name_that_is_too_long_for_its_mask(self, shell, model, cases, tmp_path):
        (cases/'images/c0.nii').rename(cases/f'images/{"y"*250}.nii')
        code,out,err = shell('predict', model, cases/'images', tmp_path/'o', '--images', '*.nii')
        assert code==1 and 'too long' in err and len(out.splitlines())==len(list((cases/'images').iterdir()))-1

    def test_letters_that_the_stream_does_not_have(self, model, cases, tmp_path, monkeypatch):
        (cases/'images/c0.nii').rename(cases/'images/ü.nii')
        said = io.BytesIO()
        monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(said, 'ascii', write_through=True))
        assert main(['predict', str(model), str(cases/'images'), str(tmp_path/'o'), '--images', '*.nii'])==0
        assert len(said.getvalue().splitlines())==len(list((cases/'images').iterdir()))

@pytest.mark.parametrize('out', ['m.safetensors','m.pkl'])
def test_a_model_that_cannot_be_scored_is_written(shell, study, cases, tmp_path, monkeypatch, out):
    "Where the masks are gone when the training ends"
    from fastmed.learn.learner import VolumeLearner
    def evaluate(self): raise FileError('c0.nii: no such file')
    monkeypatch.setattr(VolumeLearner, 'evaluate', evaluate)
    code,said,err = shell('train', study[0], *words_of(study), '--codes', 'background,large,small',
                          '--epochs', 1, '--spacing', 2,
                          '--workers', 0, '--cache', tmp_path/'s', '--out', tmp_path/out)
    assert code==1 and 'was not scored: c0.nii: no such file' in err and f'{out} written' in said
    assert (tmp_path/out).stat().st_size>10_000 and not list(tmp_path.glob('*.resume'))

def test_closed_streams(shell, model, cases, tmp_path, monkeypatch):
    "As a daemon has them"
    for k in ('stdout','stderr'): monkeypatch.setattr(sys, k, None)
    assert main(['predict', str(model), str(cases/'images/c0.nii'), str(tmp_path/'o.nii.gz')])==0 and (tmp_path
            /'o.nii.gz').exists()

def test_evaluate_names_who_failed(shell, model, cases):
    (cases/'images/c0.nii').write_bytes(b'no scan')
    code,out,err = shell('evaluate', model, cases, *words_of(cases))
    assert code==1 and err.startswith('c0: error') and err.count('\n')==1 and 'dice' in out

def test_a_mask_is_no_image(shell, tmp_path):
    "A pattern that takes the masks too would make each the image of itself"
    for c in 'ab':
        (tmp_path/c).mkdir()
        for n in ('img','seg'): (tmp_path/c/f'{n}.nii.gz').touch()
    for images,masks in (('*/*.nii.gz','*/seg.nii.gz'), ('**/*.nii.gz','**/seg.nii.gz'), ('*/*.nii.gz','*/*.nii.gz')):
        code,_,err = shell('check', tmp_path, '--images', images, '--masks', masks)
        assert code==2 and 'both image and mask' in err, (images, err)

# --- an attack on the shell

@pytest.mark.parametrize('words', ['train E', 'train D --out E', 'train D --cache E', 'check E', 'check D --html E',
    'check D --cache E', 'predict M E O', 'predict M D E', 'predict E D O', 'evaluate E D', 'evaluate M E',
    'evaluate M D --csv E', 'scan E', 'scan D --csv E', 'compare E', 'demo --path E'])
def test_an_empty_path_is_not_the_folder_one_stands_in(shell, study, tmp_path, words, monkeypatch):
    "As of a variable of the shell that is not set"
    monkeypatch.chdir(tmp_path)
    at = dict(D=study[0], M='m.safetensors', O='o', E='')
    code,out,err = shell(*[at.get(o, o) for o in words.split()])
    assert code==2 and 'found an empty text' in err and not out and not list(tmp_path.iterdir())

@pytest.mark.parametrize('words,says', [
    ('train D --seed 99999999999999999999', 'seed'), ('demo --n 1', '--n'), ('demo --n 99999999999999999999', '--n'),
    ('train D --out .safetensors', 'ends in .safetensors'), ('compare .', 'expected a file'),
    ('predict M D O --images /etc/*', 'expected a pattern'), ('predict M /dev/null O', 'found a device'),
    ('scan /dev/null', 'found a device'),
    ('train D --spacing 1e-9 --cache S IM', 'spacing')])
def test_a_clumsy_argument_is_named(shell, study, tmp_path, words, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'m.safetensors').write_text('')
    at = dict(D=[study[0]], M=['m.safetensors'], O=['o'], S=[tmp_path/'s'], IM=words_of(study))
    code,out,err = shell(*[x for o in words.split() for x in at.get(o, [o])])
    assert code==2 and says in err and not out and {o.name for o in tmp_path.iterdir()} <= {'m.safetensors','s'}, err

def test_masks_are_written_to_a_folder_and_of_one_scan_no_channels_are_taken(shell, model, study, tmp_path):
    write_gz(study[0], tmp_path/'in')
    for words,says in (([tmp_path/'in', tmp_path/'m.nii.gz'], 'give a folder'),
                       ([tmp_path/'in/c0.nii.gz', tmp_path/'m.nii.gz', '--channels', 2], 'leave --channels out'),
                       ([tmp_path/'in/c0.nii.gz', tmp_path/'m.png'], 'holds one slice')):
        code,out,err = shell('predict', model, *words)
        assert code==2 and says in err and not out and {o.name for o in tmp_path.iterdir()}=={'in','m.safetensors'}

class TestAnswers:
    @pytest.fixture
    def classifier(self, monkeypatch):
        "A model of cases that fails where it is told to"
        import pandas as pd

        import fastmed.cli
        res = {}
        def predict_folder(folder, images, tta=False):
            return pd.DataFrame([dict(case=o.name, file=str(o), pred='a', status=res.get('status', 'ok'))
                                 for o in sorted(Path(folder).glob(images))])
        learn = SimpleNamespace(task='category', predict_folder=predict_folder)
        monkeypatch.setattr(fastmed.cli, '_load_file', lambda *a: learn)
        return res

    def test_channels_are_not_taken_and_dropped(self, shell, classifier, study, tmp_path):
        code,_,err = shell('predict', 'm', study[0]/'images', tmp_path/'o.csv', '--images', '*.nii', '--channels', 2)
        assert code==2 and '--channels' in err and not list(tmp_path.iterdir())

    def test_one_that_fails_leaves_no_table_in_the_way(self, shell, classifier, study, tmp_path):
        classifier['status'] = 'error: no'
        code,out,err = shell('predict', 'm', study[0]/'images/c0.nii', tmp_path/'o.csv')
        assert code==1 and 'error: no' in err and not out and not list(tmp_path.iterdir())

    @pytest.mark.skipif(sys.platform!='linux', reason='names of any bytes')
    def test_a_name_of_bytes_that_are_no_letters(self, shell, classifier, study, tmp_path):
        (tmp_path/'in').mkdir()
        shutil.copy(study[0]/'images/c0.nii', os.fsencode(tmp_path/'in')+b'/c\xff.nii')
        code,_,err = shell('predict', 'm', tmp_path/'in', tmp_path/'o.csv', '--images', '*.nii')
        assert code==0 and '\\udcff' in (tmp_path/'o.csv').read_text()

    def test_no_sign_for_the_terminal_is_passed_on(self, shell, classifier, study, tmp_path):
        classifier['status'] = 'error: \x1b]0;owned\x07'
        err = shell('predict', 'm', study[0]/'images/c0.nii', tmp_path/'o.csv')[2]
        assert '\\x1b]0;owned\\x07' in err and err.rstrip('\n').isprintable()

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='pipes of POSIX')
def test_a_pipe_is_no_file_to_replace(shell, model, study, tmp_path):
    os.mkfifo(tmp_path/'o.nii.gz')
    code,_,err = shell('predict', model, study[0]/'images/c0.nii', tmp_path/'o.nii.gz', '--overwrite')
    assert code==2 and 'found a named pipe' in err and (tmp_path/'o.nii.gz').is_fifo()

def test_check_keeps_what_it_found_where_it_is_told(shell, study, tmp_path):
    assert shell('check', study[0], *words_of(study, '--cache', tmp_path/'s'))[0] in (0,1)
    assert (tmp_path/'s/facts').is_dir()

@pytest.mark.skipif(sys.platform=='win32', reason='descriptors of POSIX')
class TestStreams:
    def run(self, code, *args, **kwargs):
        return subprocess.run([sys.executable, '-c', code, *map(str, args)], env=ENV, capture_output=True, text=True,
                              **kwargs)

    def test_no_file_gets_the_number_of_a_closed_stream(self, tmp_path):
        "What a library writes to 2 would stand in it"
        r = self.run("""import os, sys
for i in range(3): os.close(i)
sys.stdin = sys.stdout = sys.stderr = None
import fastmed.cli
fastmed.cli.main(['--version'])
fd = os.open(sys.argv[1], os.O_CREAT|os.O_WRONLY)
os.write(fd, str(fd).encode())""", tmp_path/'fd')
        assert int((tmp_path/'fd').read_text())>2, r

    @pytest.mark.parametrize('where', ['pipe','full'])
    def test_nobody_reads(self, study, where):
        "As before `| head`: quiet, with the code of every other program; a full disk is told"
        if where=='full' and not Path('/dev/full').exists(): pytest.skip('needs /dev/full')
        r,w = os.pipe()
        os.close(r)
        if where=='full': w = os.open('/dev/full', os.O_WRONLY)
        p = subprocess.run([sys.executable, '-m', 'fastmed', 'check', study[0], *words_of(study)], env=ENV, stdout=w,
                           stderr=subprocess.PIPE, text=True)
        os.close(w)
        assert (p.returncode, p.stderr)==(141, '') if where=='pipe' else p.returncode==2 and 'No space left' in p.stderr

def test_a_module_of_the_folder_one_stands_in_is_not_run(tmp_path):
    "`python -m` puts that folder first"
    (tmp_path/'argparse.py').write_text("open('ran', 'w')")
    r = subprocess.run([sys.executable, '-m', 'fastmed', '--version'], env=ENV, cwd=tmp_path, capture_output=True,
                       text=True)
    assert r.stdout.startswith('fastmed') and not (tmp_path/'ran').exists(), r

def test_a_report_of_somebody_is_kept(shell, study, tmp_path, monkeypatch):
    "Before anything is trained; the next one replaces its own"
    import fastmed.all
    from fastmed.plot import html_report
    class Trained(Exception): pass
    def comparison(*args, **kwargs): raise Trained
    monkeypatch.setattr(fastmed.all, 'Comparison', comparison)
    plan,report = tmp_path/'plan.toml',tmp_path/'index.html'
    plan.write_text(f"data = '{study[0]}'\nimages = 'images/*.nii'\nmasks = 'labels/*.nii'\nreport = 'index.html'\n")
    report.write_text('of somebody')
    code,_,err = shell('compare', plan)
    assert code==2 and '--overwrite' in err and report.read_text()=='of somebody'
    with pytest.raises(Trained): shell('compare', plan, '--overwrite')
    html_report(report, 'a', 'b', {})
    with pytest.raises(Trained): shell('compare', plan)
    plan.write_text('df = 1\n'+plan.read_text())
    code,_,err = shell('compare', plan)
    assert code==2 and 'df: cannot be set in a plan' in err

class TestTraining:
    @pytest.fixture(autouse=True)
    def heeded(self):
        "In the background of a shell Ctrl-C is ignored, and what is ignored stays so"
        was = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, was)

    def words(self, study, tmp_path, *more):
        return ['train', study[0], *words_of(study, '--out', tmp_path/'m.safetensors', '--epochs', 2, '--cache',
                                             tmp_path/'s', '--spacing', 2.5, '--workers', 0, *more)]

    def test_two_of_one_name_at_once(self, shell, study, tmp_path):
        "The second is told so before it trains"
        from fastmed.core import beside
        with beside(tmp_path/'m.safetensors', alone=True):
            code,out,err = shell(*self.words(study, tmp_path))
        assert code==2 and 'another process' in err and not out

    @pytest.mark.skipif(not hasattr(signal, 'sigwaitinfo'), reason='signals of POSIX')
    @pytest.mark.parametrize('sign,code', [('SIGTERM',143), pytest.param('SIGINT', 130, marks=pytest.mark.slow),
                                           pytest.param('SIGHUP', 129, marks=pytest.mark.slow)])
    def test_a_signal_to_all_processes_of_a_job(self, study, tmp_path, sign, code):
        "The workers leave it to their training, and end with it"
        words = self.words(study, tmp_path)
        words[words.index('--workers')+1] = 2
        code_of = '''import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from fastai.learner import Learner
from fastmed.cli import main
was = Learner.one_batch
def one_batch(self, i, b):
    if self.training and i==self.epoch==0:
        print('up', flush=True)
        sys.stdin.readline()
    was(self, i, b)
Learner.one_batch = one_batch
if __name__=='__main__': sys.exit(main())'''
        p = subprocess.Popen([sys.executable, '-c', code_of, *map(str, words)], env=ENV, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        while p.stdout.readline() not in ('up\n', ''): pass
        os.killpg(p.pid, getattr(signal, sign))
        time.sleep(.5)
        err = p.communicate('\n', timeout=1200)[1]
        assert (p.returncode, err.splitlines()[-1])==(code, 'fastmed: stopped'), err
        with pytest.raises(ProcessLookupError): os.killpg(p.pid, 0)
        s = read_state(tmp_path/'m.safetensors.resume')
        assert (s['epoch'], s['batch'])==(0, 1) and not list(tmp_path.glob('.part*'))

    def test_asked_twice_at_once(self, shell, study, tmp_path, monkeypatch):
        "As `timeout` asks; and in the validation after the last batch"
        from fastai.learner import Learner
        was = Learner.one_batch
        for training,n,state in ((True, 3, (0,4)), (False, 0, (2,0))):
            def one_batch(self, i, b, training=training, n=n):
                if self.training==training and i==n and self.epoch==1-training:
                    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)
                was(self, i, b)
            with monkeypatch.context() as m:
                m.setattr(Learner, 'one_batch', one_batch)
                res,_,err = shell(*self.words(study, tmp_path, *[] if training else ['--resume']))
            assert res==143 and err.endswith('fastmed: stopped\n'), err
            s = read_state(tmp_path/'m.safetensors.resume')
            assert (s['epoch'], s['batch'])==state

    @pytest.mark.skipif(sys.platform=='win32', reason='signals of POSIX')
    @pytest.mark.parametrize('sign,code', [('SIGINT',130), ('SIGTERM',143)])
    def test_asked_to_stop(self, shell, study, tmp_path, monkeypatch, sign, code):
        "What was learnt so far is kept, though it is no 50th batch"
        from fastai.learner import Learner
        was = Learner.one_batch
        def one_batch(self, i, b):
            if self.training and i==3: os.kill(os.getpid(), getattr(signal, sign))
            was(self, i, b)
        with monkeypatch.context() as m:
            m.setattr(Learner, 'one_batch', one_batch)
            res,_,err = shell(*self.words(study, tmp_path))
        assert res==code and err.endswith('fastmed: stopped\n')
        assert (tmp_path/'m.safetensors.resume').exists() and not (tmp_path/'m.safetensors').exists()
        code,_,err = shell(*self.words(study, tmp_path, '--resume'))
        assert code==0 and (tmp_path/'m.safetensors').exists(), err
