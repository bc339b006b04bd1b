"""A disk that is full or read-only, a destination that is a folder: one clear error, the old file as it was, nothing
half-written beside it."""
import contextlib
import errno
import functools
import gc
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from phantoms import CODES, write_case

from fastmed.all import (
    Comparison,
    FastmedError,
    PictureCallback,
    Preprocess,
    ResumeCallback,
    Store,
    TensorVolume,
    TensorVolumeMask,
    check_dataset,
    load_volume,
    save_model,
    save_volume,
    untar_data,
)
from fastmed.core import FileError, atomic_file, atomic_folder, beside
from fastmed.data.store import label_values
from fastmed.plot import html_report


@contextlib.contextmanager
def disk(path, size):
    "A small disk of its own at `path`; the test is skipped where this process may not mount one"
    path.mkdir(parents=True, exist_ok=True)
    r = subprocess.run(['mount','-t','tmpfs','-o',f'size={size}','tmpfs',str(path)], capture_output=True,
                        text=True) if sys.platform=='linux' else None
    if r is None or r.returncode:
        pytest.skip(f'no right to mount a disk to fill ({r.stderr.strip() if r else sys.platform})')
    try: yield path
    finally: subprocess.run(['umount','-l',str(path)], check=True)

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    with disk(tmp_path_factory.mktemp('disk')/'d', '2m') as d: yield d

@contextlib.contextmanager
def filled(path, left=0):
    "No room but `left` bytes"
    # or what is removed and still mapped gives its room back later
    gc.collect()
    fill = path/'.fill'
    with open(fill, 'wb', buffering=0) as f:
        with contextlib.suppress(OSError):
            while True: f.write(bytes(4096))
        f.truncate(max(0, f.tell()-left))
    try: yield
    finally: fill.unlink()

@contextlib.contextmanager
def read_only(path):
    "The disk, not to be written; root would pass by the permissions of a folder"
    def go(how):
        # a file that is just being closed keeps the disk busy
        for _k in range(50):
            r = subprocess.run(['mount','-o',f'remount,{how}',str(path)], capture_output=True, text=True)
            if not r.returncode: return
            gc.collect()
            time.sleep(.05)
        pytest.skip(f'this machine does not remount a disk: {r.stderr.strip()}')
    go('ro')
    try: yield
    finally: go('rw')

def snapshot(path):
    return {str(f.relative_to(path)):(f.read_bytes() if f.is_file() else None) for f in sorted(path.rglob('*'))
            if f.name!='.fill'}

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    p = tmp_path_factory.mktemp('scans')
    return p,pd.DataFrame([write_case(p, f'c{i}', shape=(24,24,24), seed=i) for i in range(4)])

@pytest.fixture(scope='module')
def web(tmp_path_factory):
    www = tmp_path_factory.mktemp('www')
    (www/'big.bin').write_bytes(os.urandom(1_500_000))
    with tarfile.open(www/'big.tar', 'w') as t: t.add(www/'big.bin', 'big/a.bin')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(www)))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{srv.server_port}/big.tar',hashlib.md5((www/'big.tar').read_bytes()).hexdigest()
    srv.shutdown()
    srv.server_close()

NOISE = np.random.default_rng(0).normal(size=(40,40,40)).astype(np.float32)

def writers(learner, scans, web):    # a table  # noqa: PLR0915
    "name → (function of a folder that writes there, what the error must name)"
    p,df = scans
    ims = [str(p/o) for o in df.image]
    ms = [str(p/o) for o in df['mask']]
    vol,mask = TensorVolume(torch.from_numpy(NOISE[None]),
                            affine=np.eye(4)),TensorVolumeMask(torch.from_numpy((NOISE*99).astype(np.int32)),
                                                               affine=np.eye(4))
    def fit(cb):
        def go(d):
            l = learner(3)
            l.path = d
            with l.no_bar(), l.no_logging(): l.fit(1, cbs=cb)
        return go
    def masks(d):
        l = learner(3)
        with l.no_bar(): l.predict_folder(p/'images', d/'masks', '*.nii', overwrite=True)
    def export(d):
        l = learner(3)
        l.path = d
        l.export('m.pkl')
    def state(d):
        l = learner(3)
        l.path = d
        l.save('w')
    def compare(d):
        from fastmed.study.runs import finish_run
        c = Comparison(df.assign(image=ims, mask=ms, subject=df.case), {'3D':dict(ndim=3)}, codes=CODES, folds=2,
                       path=d/'c')
        c._check_folder()
        l = learner(3)
        spec = dict(arm='3D', fold=0, seed=0, budget=dict(updates=1), hash=c.hash, group_col=None, slice_axis=None)
        if not hasattr(l, 'recorder') or not getattr(l.recorder, 'losses', None):
            l.recorder.losses,l.recorder.lrs = [.5]*5000,[.1]*5000
        f = c._folder('3D', 0, 0)
        with beside(f, True, f.parent/'unfinished') as tmp: finish_run(l, spec, {}, f, {}, tmp)
    def table(d):
        with atomic_file(d/'t.csv') as tmp: pd.DataFrame(NOISE.reshape(-1,40)).to_csv(tmp)
    def facts(d): label_values(Store(Preprocess(), d/'facts of masks'), ms)
    res = {f'save_volume {s}':(lambda d, s=s: save_volume(vol, d/f'v{s}'), f'v{s}') for s in ('.nii','.nii.gz','.nrrd',
            '.mha')}
    res |= {'save_volume .png':(lambda d: save_volume(TensorVolumeMask(torch.randint(0, 255, (900,900,1)),
            affine=np.eye(4)), d/'v.png'), 'v.png'), 'save a mask':(lambda d: mask.save(d/'m.nii.gz'), 'm.nii.gz'),
            'Store image':(lambda d: Store(Preprocess(spacing=.6), d/'s').build(ims), 's'),
            'Store mask':(lambda d: Store(Preprocess(spacing=.6), d/'s').build([], ms), 's'),
            'label_values':(facts, 'labels-'), 'table':(table, 't.csv'),
            'ResumeCallback':(fit(ResumeCallback('r.pth', 1)), 'r.pth'),
            'PictureCallback':(fit(PictureCallback(n=1)), 'epoch_000.png'), 'learn.export':(export, 'm.pkl'),
            'learn.save':(state, 'w.pth'),
            'predict_folder':(masks, 'c0.nii.gz'), 'Comparison':(compare, 'c'),
            'html_report':(lambda d: html_report(d/'r.html', 'a', 'b', {'c':'d'*100_000}), 'r.html'),
            'check html':(lambda d: check_dataset(df.assign(image=ims, mask=ms), CODES).html(d/'c.html'), 'c.html'),
            'untar_data':(lambda d: untar_data(web[0], base=d, checksum=web[1]), 'big')}
    with contextlib.suppress(ImportError):
        import safetensors  # noqa: F401
        res['save_model'] = (lambda d: save_model(learner(3), d/'m.safetensors'), 'm.safetensors')
    return res

NAMES = ['save_volume .nii','save_volume .nii.gz','save_volume .nrrd','save_volume .mha','save_volume .png',
         'save a mask','Store image','Store mask','label_values','table','ResumeCallback','PictureCallback',
         'learn.export','learn.save',
         'predict_folder','Comparison','html_report','check html','untar_data','save_model']

@pytest.fixture
def writer(learner, scans, web):
    def get(name):
        w = writers(learner, scans, web)
        if name not in w: pytest.skip(f'{name}: an extra is missing')
        return w[name]
    return get

def clear(path):
    for o in path.iterdir(): shutil.rmtree(o) if o.is_dir() else o.unlink()

@pytest.mark.parametrize('name', NAMES)
def test_full(small, writer, name):
    """Full to the last byte, and with a little room, so that it breaks off in the middle: what is there afterwards is
    whole"""
    go,word = writer(name)
    for left in (0, 8192):
        with filled(small, left):
            # their files are smaller than that
            if left and name in ('label_values','PictureCallback','predict_folder'):
                continue
            with pytest.raises(FileError, match='disk is full') as e: go(small)
            assert word in str(e.value) and e.value.errno==errno.ENOSPC, e.value
        assert not [k for k,v in snapshot(small).items() if v is not None
                    and not k.endswith(('.lock','comparison.json')) and '/facts/digest-' not in k]
    clear(small)

@pytest.mark.parametrize('name', NAMES)
def test_read_only(small, writer, name):
    go,word = writer(name)
    before = snapshot(small)
    with read_only(small):
        with pytest.raises(FileError, match='read-only|Read-only') as e: go(small)
        assert str(small) in str(e.value) and e.value.errno==errno.EROFS, e.value
    assert snapshot(small)==before

def test_the_old_file_stays(small, writer):
    "What stood there before is there still, byte for byte"
    for name,fn in (('save_volume .nii.gz','v.nii.gz'), ('save_volume .nrrd','v.nrrd'), ('ResumeCallback','r.pth'),
            ('html_report','r.html'), ('table','t.csv')):
        go,_ = writer(name)
        (small/fn).write_bytes(b'the old one') if name!='ResumeCallback' else None
        for left in (0, 8192):
            with filled(small, left), pytest.raises(FileError): go(small)
        if name!='ResumeCallback': assert (small/fn).read_bytes()==b'the old one'
        assert not [o for o in small.iterdir() if o.name.startswith('.part')]
    clear(small)

def test_no_writer_ends_short(small):
    "Room for all but the last bytes: a writer that does not look at what closing says would leave a file cut off"
    vol = TensorVolume(torch.from_numpy(NOISE[None,:12,:12,:12]), affine=np.eye(4))
    for sfx in ('.nii','.nii.gz','.nrrd','.mha'):
        n = save_volume(vol, small/f'a{sfx}').stat().st_size
        (small/f'a{sfx}').unlink()
        short = 0
        for left in range(0, n+8192, 4096):
            with filled(small, left):
                try: save_volume(vol, small/f'a{sfx}')
                except FileError: short += 1
                else: assert torch.equal(load_volume(small/f'a{sfx}'), vol)
            (small/f'a{sfx}').unlink(missing_ok=True)
        assert short

@pytest.mark.parametrize('name,fn', [('save_volume .nii','v.nii'), ('learn.export','m.pkl'),
        ('learn.save','models/w.pth'), ('html_report','r.html'), ('save_model','m.safetensors'), ('table','t.csv'),
        ('check html','c.html')])
def test_a_folder_stands_there(tmp_path, writer, name, fn):
    go,_ = writer(name)
    (tmp_path/fn).mkdir(parents=True)
    (tmp_path/fn/'keep').write_text('me')
    with pytest.raises(OSError) as e: go(tmp_path)
    assert isinstance(e.value, FastmedError) and fn.split('/')[-1] in str(e.value) and 'folder' in str(e.value)
    assert (tmp_path/fn/'keep').read_text()=='me' and not [o for o in tmp_path.rglob('.part*')]

def test_a_file_stands_where_a_folder_should(tmp_path, writer):
    (tmp_path/'s').write_text('a file')
    (tmp_path/'masks').write_text('a file')
    for name in ('Store image','predict_folder'):
        with pytest.raises(FileError, match='a file is where a folder should be'): writer(name)[0](tmp_path)

@pytest.fixture
def small_files():
    "Where no disk can be mounted, a limit of 10 kB on the size of a file does the same"
    resource = pytest.importorskip('resource')
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def test_larger_than_allowed(small_files, tmp_path):
    with pytest.raises(FileError, match='a.npy: could not be written: it would be larger') as e, \
         atomic_file(tmp_path/'a.npy') as tmp, open(tmp, 'wb') as f: f.write(bytes(10**5))
    assert e.value.errno==errno.EFBIG and not list(tmp_path.iterdir())

def test_larger_than_allowed_by_numpy(small_files, tmp_path):
    "Which does not say why its bytes were not written"
    with pytest.raises(FileError, match='could not be written: it would be larger') as e, \
         atomic_folder(tmp_path/'a') as d: np.save(d/'data.npy', NOISE)
    assert e.value.errno==errno.EFBIG

def test_read_only_stores_serve(small, scans):
    "A store and a download that are whole are read from a read-only disk"
    p,df = scans
    ims = [str(p/o) for o in df.image[:2]]
    s = Store(Preprocess(spacing=2.), small/'s').build(ims)
    with read_only(small):
        assert Store(Preprocess(spacing=2.), small/'s').build(ims).image(ims[0]).shape==s.image(ims[0]).shape
    clear(small)

def test_from_the_shell(small, scans, capsys):
    "One line, exit code 2, before anything is trained"
    from fastmed.cli import main
    p,df = scans
    with filled(small):
        assert main(['train', str(p), '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--codes', ','.join(CODES),
                '--out', str(small/'m.pkl'), '--cache', str(small/'s')])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'disk is full' in err
        assert main(['check', str(p), '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--html',
                str(small/'r.html')])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'r.html' in err
    with read_only(small):
        assert main(['train', str(p), '--images', 'images/*.nii', '--masks', 'labels/*.nii', '--out',
                str(small/'m.pkl')])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'm.pkl' in err and 'read-only' in err
