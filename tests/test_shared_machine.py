"""Somebody else's files on a shared machine: pipes among scans, a store that was purged or overwritten, no home, a disk
that says no."""
import contextlib
import errno
import http.server
import io
import os
import shutil
import signal
import socket
import stat
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from phantoms import write_case

import fastmed.core
import fastmed.data.downloads
import fastmed.data.store
from fastmed.all import (
    InputError,
    Preprocess,
    Store,
    TensorVolume,
    cache_dir,
    check_dataset,
    load_mask,
    load_volume,
    read_header,
    save_volume,
    scan_dicom,
    scan_folder,
    untar_data,
)
from fastmed.core import FileError, MissingFileError, atomic_file
from fastmed.io.formats import file_digest

pytestmark = pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='pipes and owners of POSIX')

@pytest.fixture(autouse=True)
def limit():
    "Whoever waits for a pipe waits for ever: the test fails instead"
    # no `Exception`, so nobody takes it for an unreadable scan
    def stop(*args):
        pytest.fail('it hangs')
    was = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, was)

def plant(fn, kind):
    "What is no file, under the name of a scan"
    fn = Path(fn)
    if kind=='pipe': os.mkfifo(fn)
    if kind=='device': fn.symlink_to('/dev/zero')
    if kind=='dangling': fn.symlink_to(fn.parent/'taken away')
    if kind=='circle': fn.symlink_to(fn)
    if kind=='folder': fn.mkdir()
    if kind=='socket':
        s,here = socket.socket(socket.AF_UNIX),os.getcwd()
        os.chdir(fn.parent)                                       # names of sockets are short
        try: s.bind(fn.name)
        finally:
            os.chdir(here)
            s.close()
    return fn

KINDS = ('pipe','device','dangling','circle','folder','socket')

class TestOddEntries:
    def test_a_folder_of_them_is_predicted(self, learner, study, tmp_path):
        "The others have their masks and their rows; each odd one is named"
        src,dst = tmp_path/'in',tmp_path/'out'
        src.mkdir()
        for i in range(2): nib.save(nib.load(study[0]/f'images/c{i}.nii'), src/f'c{i}.nii.gz')
        for k in KINDS: plant(src/f'{k}.nii.gz', k)
        learn = learner(3)
        with learn.no_bar(): res = learn.predict_folder(src, dst).set_index('case')
        assert set(res.index)=={'c0','c1',*KINDS} and (res.status[['c0','c1']]=='ok').all()
        assert all(res.status[k].startswith('error') and f'{k}.nii.gz' in res.status[k]
                   for k in KINDS), res.status.tolist()
        assert sorted(o.name for o in dst.iterdir())==['c0.nii.gz','c1.nii.gz']

    def test_a_data_set_of_them_is_checked(self, tmp_path):
        for i in range(2): write_case(tmp_path, f'c{i}', seed=i)
        for k in KINDS: plant(tmp_path/f'images/{k}.nii', k)
        res = check_dataset(scan_folder(tmp_path, 'images/*.nii', masks=None))
        assert set(res.errors.case)==set(KINDS), res.to_string()

    @pytest.mark.parametrize('end', ['.nii','.nii.gz','.nrrd','.mha','.png','.tif','.dcm',''])
    @pytest.mark.parametrize('kind', ['pipe','device'])
    def test_no_reader_waits(self, tmp_path, end, kind):
        fn = plant(tmp_path/f'scan{end}', kind)
        for f in (load_volume, load_mask, read_header, file_digest):
            with pytest.raises(FileError, match=f'scan{end}: expected a file; found a (named pipe|device)'): f(fn)

    def test_a_dangling_link_says_where_it_leads(self, tmp_path):
        fn = plant(tmp_path/'scan.nii', 'dangling')
        for f in (load_volume, read_header, file_digest, lambda fn: Store(Preprocess(), tmp_path/'s').build([fn])):
            with pytest.raises(MissingFileError, match='scan.nii: is a link to .*taken away, which is not there'): f(fn)

    def test_a_pipe_in_place_of_a_table(self, tmp_path):
        write_case(tmp_path, 'c0')
        os.mkfifo(tmp_path/'cases.csv')
        with pytest.raises(FileError, match='cases.csv: expected a file; found a named pipe'):
            scan_folder(tmp_path, 'images/*.nii', 'labels/*.nii')

    def test_a_pipe_among_dicom_is_named(self, tmp_path):
        os.mkfifo(tmp_path/'a.dcm')
        with pytest.raises(FileError, match='1 cannot be read'): scan_dicom(tmp_path)

# --- the store

def volume(fn, value):
    return str(save_volume(TensorVolume(np.full((1,12,12,12), value, np.float32), affine=np.eye(4)), fn))

@pytest.fixture
def kept(tmp_path):
    "A store of two images and two masks, all of one shape: (function that opens it anew, files, masks)"
    def make(): return Store(Preprocess(normalize='none', codes=['a','b','c']), tmp_path/'store')
    files,masks = [],[]
    for i in range(2):
        row = write_case(tmp_path, f'c{i}', seed=i, mask=lambda m, i=i: np.roll(m, i, 0))
        files.append(str(tmp_path/row['image']))
        masks.append(str(tmp_path/row['mask']))
    make().build(files, masks)
    return make,files,masks

@pytest.fixture
def settled(monkeypatch):
    "As if every file had been written long ago, so that records of digests are kept and used"
    now = fastmed.data.store.time.time_ns
    class Later:
        def time_ns(self): return now()+10**10
    monkeypatch.setattr(fastmed.data.store, 'time', Later())

def overwrite(fn, a):
    "Other bytes of the same size under the old time"
    st = fn.stat()
    fn.write_bytes(a if isinstance(a, bytes) else fn.read_bytes()[:-a.nbytes]+a.tobytes())
    os.utime(fn, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert fn.stat().st_size==st.st_size

def harm(e, other, how):
    if how=='zeros': overwrite(e/'data.npy', np.zeros_like(np.load(e/'data.npy')))
    elif how=='all zeros': overwrite(e/'data.npy', bytes((e/'data.npy').stat().st_size))
    elif how=='a hole': overwrite(e/'data.npy', np.zeros_like(np.load(e/'data.npy').reshape(-1)[2000:]))
    elif how=='of another': overwrite(e/'data.npy', (other/'data.npy').read_bytes())
    elif how=='the other entry':
        shutil.rmtree(e)
        shutil.copytree(other, e)
    elif how=='empty':
        for o in e.iterdir(): o.unlink()
    else: (e/how).unlink()

HARM = ('zeros','all zeros','a hole','of another','the other entry','empty','data.npy','meta.json')

class TestStore:
    @pytest.mark.parametrize('how', HARM)
    @pytest.mark.parametrize('built', [True, False])
    def test_an_entry_that_is_not_whole_is_made_anew(self, kept, settled, how, built):
        "Found by `build`, and where an entry is read without it; said once"
        make,files,masks = kept
        # every entry was looked at, and its digest kept
        s = make().build(files, masks)
        right = [s.image(files[0]).numpy().copy(), s.mask(masks[0]).numpy().copy()]
        for kind,fs in (('image',files), ('mask',masks)): harm(s.entry(kind, fs[0]), s.entry(kind, fs[1]), how)
        new = make()
        with pytest.warns(UserWarning, match='is damaged, and is made again') as w:
            if built: new.build(files, masks)
            assert np.array_equal(new.image(files[0]).numpy(), right[0]) and np.array_equal(new.mask(masks[0]).numpy(),
                    right[1])
        # `build` says it once for all
        assert sum('made again' in str(o.message) for o in w)==2-built, [str(o.message) for o in w]
        for kind,fs in (('image',files), ('mask',masks)): assert new.whole(new.entry(kind, fs[0]))

    def test_places_of_foreground_are_part_of_it(self, kept, settled):
        make,files,masks = kept
        s = make().build(files, masks)
        e,other = [s.entry('mask', o) for o in masks]
        fg = s.mask(masks[0]).fg
        shutil.copy(other/'fg.npz', e/'fg.npz')
        with pytest.warns(UserWarning, match='made again'): m = make().build(files, masks).mask(masks[0])
        assert all(np.array_equal(m.fg[k], fg[k]) for k in fg)

    def test_purged_while_it_is_in_use(self, kept):
        "By whoever cleans the disk, between two looks of one process"
        make,files,masks = kept
        s = make().build(files, masks)
        (s.entry('image', files[0])/'data.npy').unlink()
        with pytest.warns(UserWarning, match='made again'): assert s.image(files[0]).shape[0]==1

    def test_a_store_that_cannot_be_written_still_serves(self, kept, settled, monkeypatch):
        make,files,masks = kept
        s = make()
        right = s.preprocess(load_volume(files[0])).numpy()
        harm(s.entry('image', files[0]), s.entry('image', files[1]), 'zeros')
        def no(*args): raise FileError('read-only')
        monkeypatch.setattr(Store, '_keep', no)
        with pytest.warns(UserWarning, match='made again'): assert np.array_equal(s.image(files[0]).numpy(), right)

    def test_a_copy_of_the_store_serves(self, kept, settled, tmp_path, monkeypatch):
        "With other times and inodes: what is in it is as it was"
        make,files,masks = kept
        shutil.copytree(tmp_path/'store', tmp_path/'copy', copy_function=shutil.copyfile)
        monkeypatch.setattr(Preprocess, '__call__', lambda *a: pytest.fail('made again'))
        Store(make().preprocess, tmp_path/'copy').build(files, masks)

    def test_voxels_are_read_for_it_once(self, kept, settled, monkeypatch):
        "Not at each start, and not at each patch"
        make,files,masks = kept
        make().build(files, masks)
        asked,ask = [],fastmed.data.store.file_digest
        monkeypatch.setattr(fastmed.data.store, 'file_digest', lambda fn: asked.append(Path(fn).name) or ask(fn))
        s = make().build(files, masks)
        assert 'data.npy' not in asked
        asked.clear()
        for fn,m in zip(files, masks): s.image(fn), s.mask(m)
        s._open.clear()
        for fn,m in zip(files, masks): s.image(fn), s.mask(m)
        assert not asked

    @pytest.mark.parametrize('first', ['build','fact'])
    def test_it_is_private(self, tmp_path, first):
        fn = volume(tmp_path/'a.nii', 1.)
        s = Store(Preprocess(normalize='none'), tmp_path/'here'/'store')
        if first=='fact': s.cached('x', 1, lambda: 2)
        s.build([fn])
        assert stat.S_IMODE((tmp_path/'here'/'store').stat().st_mode)==0o700

    def test_a_folder_that_was_there_keeps_its_rights(self, tmp_path):
        (tmp_path/'ours').mkdir()
        (tmp_path/'ours').chmod(0o775)
        Store(Preprocess(normalize='none'), tmp_path/'ours').build([volume(tmp_path/'a.nii', 1.)])
        assert stat.S_IMODE((tmp_path/'ours').stat().st_mode)==0o775

class TestCacheDir:
    @pytest.fixture
    def nowhere(self, tmp_path, monkeypatch):
        "A user without a home: (folder of temporary files, the place in it)"
        import pwd
        import tempfile
        def none(uid): raise KeyError(uid)
        for k in ('HOME','FASTMED_CACHE'): monkeypatch.delenv(k, raising=False)
        monkeypatch.setattr(pwd, 'getpwuid', none)
        (tmp_path/'t').mkdir()
        monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'t'))
        return tmp_path/'t',tmp_path/'t'/f'fastmed-{os.geteuid()}'

    def test_no_home(self, nowhere):
        with pytest.warns(UserWarning, match='no home.*FASTMED_CACHE'): p = cache_dir()
        assert p==nowhere[1] and stat.S_IMODE(p.stat().st_mode)==0o700
        with pytest.warns(UserWarning, match='no home'): assert cache_dir()==p            # the next process finds it

    def test_a_home_that_cannot_be_written(self, nowhere, tmp_path, monkeypatch):
        (tmp_path/'file').write_text('')
        monkeypatch.setenv('HOME', str(tmp_path/'file'/'me'))
        with pytest.warns(UserWarning, match='cannot be written'): assert cache_dir()==nowhere[1]

    def test_a_folder_of_ones_own_asks_for_no_home(self, nowhere, monkeypatch, tmp_path, recwarn):
        monkeypatch.setenv('FASTMED_CACHE', str(tmp_path/'c'))
        assert cache_dir()==tmp_path/'c' and not recwarn.list
        monkeypatch.delenv('FASTMED_CACHE')
        Store(Preprocess(), tmp_path/'c')
        assert not recwarn.list and not nowhere[1].exists()

    @pytest.mark.parametrize('how', ['link','wide','owner'])
    def test_a_planted_place_is_refused(self, nowhere, tmp_path, how):
        theirs = tmp_path/'theirs'
        theirs.mkdir(mode=0o700)
        if how=='link': nowhere[1].symlink_to(theirs)
        if how=='wide':
            nowhere[1].mkdir()
            nowhere[1].chmod(0o777)
        if how=='owner':
            if os.geteuid(): pytest.skip('only root may give files away')
            nowhere[1].mkdir(mode=0o700)
            os.chown(nowhere[1], 12345, 12345)
        with pytest.raises(FileError, match='fastmed-.*Set FASTMED_CACHE'): cache_dir()

    def test_one_that_others_may_read_says_so(self, tmp_path, monkeypatch):
        monkeypatch.delenv('FASTMED_CACHE', raising=False)
        monkeypatch.setenv('HOME', str(tmp_path))
        (tmp_path/'.cache/fastmed').mkdir(parents=True)
        (tmp_path/'.cache/fastmed').chmod(0o755)
        with pytest.warns(UserWarning, match='chmod 700'): assert cache_dir()==tmp_path/'.cache/fastmed'

# --- writing

class TestWriting:
    def test_what_lasts_waits_for_the_disk(self, tmp_path, monkeypatch):
        "Bytes first, name afterwards; not for what can be made again"
        done,sync,put = [],os.fsync,os.replace
        monkeypatch.setattr(os, 'fsync', lambda fd: (done.append(os.fstat(fd).st_ino), sync(fd)))
        monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(b), put(a, b)))
        with atomic_file(tmp_path/'t.csv') as tmp: tmp.write_text('a')
        assert done==[(tmp_path/'t.csv').stat().st_ino, tmp_path/'t.csv']
        done.clear()
        Store(Preprocess(normalize='none'), tmp_path/'s').build([volume(tmp_path/'a.nii', 1.)])
        assert [o for o in done if isinstance(o, int)]==[(tmp_path/'a.nii').stat().st_ino]     # of the scan itself

    def test_a_disk_that_fails_late_is_heard(self, tmp_path, monkeypatch):
        "As network disks do, which say at the very end that there is no room; the old file stays"
        (tmp_path/'t.csv').write_text('old')
        def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr(os, 'fsync', full)
        with pytest.raises(FileError, match='disk is full'), atomic_file(tmp_path/'t.csv') as tmp: tmp.write_text('new')
        assert (tmp_path/'t.csv').read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['t.csv']

    def test_a_disk_that_cannot_be_asked_is_none(self, tmp_path, monkeypatch):
        def odd(fd): raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        monkeypatch.setattr(os, 'fsync', odd)
        with atomic_file(tmp_path/'t.csv') as tmp: tmp.write_text('new')
        assert (tmp_path/'t.csv').read_text()=='new'

    @pytest.mark.parametrize('code', [errno.EIO, errno.ELOOP, errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOTDIR])
    def test_full_is_said_of_a_full_disk_alone(self, tmp_path, monkeypatch, code):
        "Where there is no room either, as in /proc"
        monkeypatch.setattr(fastmed.core.shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9, 0))
        with pytest.raises(FileError) as e, atomic_file(tmp_path/'t.csv'): raise OSError(code, os.strerror(code), 'x')
        assert e.value.errno==code and 'disk is full' not in str(e.value) and 'Free some space' not in str(e.value)

    @pytest.mark.skipif(not Path('/proc/self').exists(), reason='needs /proc')
    def test_in_proc(self):
        with pytest.raises(FileError) as e, atomic_file('/proc/nowhere/t.csv') as tmp: tmp.write_text('a')
        assert 'full' not in str(e.value) and e.value.errno==errno.ENOENT

    def test_a_folder_that_may_not_be_entered(self, tmp_path):
        "As another user: permission is what is missing, and it is said of the file"
        (tmp_path/'theirs').mkdir(mode=0o700)
        if os.geteuid()==0: os.seteuid(12345)
        else: (tmp_path/'theirs').chmod(0)
        try:
            refused = 't.csv: could not be written: you have no permission to write there'
            with pytest.raises(FileError, match=refused) as e:
                with atomic_file(tmp_path/'theirs'/'sub'/'t.csv') as tmp: tmp.write_text('a')
        finally:
            if os.getuid()==0: os.seteuid(0)
            else: (tmp_path/'theirs').chmod(0o700)
        assert e.value.errno==errno.EACCES

# --- downloads and archives

@pytest.fixture
def web():
    "`web(name, bytes, sent)` gives the address of a file of which the server sends the first bytes"
    files = {}
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self):
            b,n = files[self.path]
            self.send_response(200)
            self.send_header('Content-Length', str(len(b)))
            self.end_headers()
            self.wfile.write(b[:n])
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    def serve(name, b, n=None):
        files[f'/{name}'] = b,n
        return f'http://127.0.0.1:{srv.server_port}/{name}'
    yield serve
    srv.shutdown()
    srv.server_close()

def packed(name):
    f = io.BytesIO()
    b = np.random.default_rng(0).bytes(60_000)
    if name.endswith('.zip'):
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('d/a.bin', b)
    else:
        with tarfile.open(fileobj=f, mode='w:gz') as t:
            o = tarfile.TarInfo('d/a.bin')
            o.size = len(b)
            t.addfile(o, io.BytesIO(b))
    return f.getvalue()

@pytest.mark.filterwarnings('ignore')
class TestDownloads:
    @pytest.mark.parametrize('name', ['a.zip','a.tgz'])
    def test_a_connection_that_ends_early(self, web, tmp_path, name):
        b = packed(name)
        with pytest.raises(FileError, match='fewer bytes arrived than the server announced'):
            untar_data(web(name, b, len(b)//2), base=tmp_path)
        assert not [o for o in tmp_path.rglob('*') if o.is_file() and o.suffix!='.lock']

    @pytest.mark.parametrize('cut', [.3, .7, .999])
    def test_a_zip_without_its_end(self, web, tmp_path, cut):
        b = packed('a.zip')
        with pytest.raises(FileError, match='a.zip: .*truncated'):
            untar_data(web('a.zip', b[:int(len(b)*cut)]), base=tmp_path)

    def test_a_flipped_bit_in_a_tgz(self, web, tmp_path):
        b = bytearray(packed('a.tgz'))
        b[len(b)//2] ^= 1
        with pytest.raises(FileError, match='a.tgz: expected a whole archive'):
            untar_data(web('a.tgz', bytes(b)), base=tmp_path)
        assert not (tmp_path/'data'/'a').exists()

    @pytest.mark.parametrize('name', ['a.zip','a.tgz'])
    def test_by_way_of_fastai(self, web, tmp_path, name, monkeypatch):
        "Whatever comes out of its function becomes one of our errors"
        b = packed(name)
        for k,(url,says) in enumerate(((web(f'0{name}', b, 9000), 'fewer bytes'),
                (web(f'1{name}', b[:9000]), 'not a zip|too early'))):
            monkeypatch.setattr(fastmed.data.downloads.external.URLs, 'OURS', url, raising=False)
            with pytest.raises(FileError, match=says): untar_data(url, archive=tmp_path/f'a{k}', data=tmp_path/f'd{k}')

    def test_planted_links_are_not_written_through(self, web, tmp_path):
        "Under the names that a download used to have while it was under way"
        theirs = tmp_path/'theirs'
        (theirs/'folder').mkdir(parents=True)
        (theirs/'diary').write_text('diary')
        for sub,name,to in (('archive','a.tgz.part',theirs/'diary'), ('archive','a.tgz.part.part',theirs/'new'),
                ('data','a.part',theirs/'folder')):
            (tmp_path/sub).mkdir(exist_ok=True)
            (tmp_path/sub/name).symlink_to(to)
        assert (untar_data(web('a.tgz', packed('a.tgz')), base=tmp_path)/'a.bin').stat().st_size==60_000
        assert (theirs/'diary').read_text()=='diary' and sorted(o.name for o in theirs.rglob('*'))==['diary','folder']

    def test_a_planted_lock_is_not_emptied(self, web, tmp_path):
        (tmp_path/'diary').write_text('diary')
        (tmp_path/'archive').mkdir()
        (tmp_path/'archive/a.tgz.lock').symlink_to(tmp_path/'diary')
        with pytest.raises(FileError), contextlib.suppress(KeyError):
            untar_data(web('a.tgz', packed('a.tgz')), base=tmp_path)
        assert (tmp_path/'diary').read_text()=='diary'

# --- values beyond what a network can take

def scan(fn, values, dtype=np.float64):
    a = np.random.default_rng(0).normal(size=(20,20,20))
    a.reshape(-1)[:len(values)] = values
    nib.save(nib.Nifti1Image(a.astype(dtype), np.eye(4)), fn)
    return fn

class TestOverflow:
    @pytest.mark.parametrize('end', ['.nii','.nii.gz','.nrrd'])
    def test_values_beyond_32_bits(self, tmp_path, end):
        "They would become infinite in silence"
        if end=='.nrrd':
            sitk = pytest.importorskip('SimpleITK')
            fn = tmp_path/'a.nrrd'
            sitk.WriteImage(sitk.GetImageFromArray(np.full((5,5,5), 1e39)), str(fn))
        else: fn = scan(tmp_path/f'a{end}', [1e39])
        with pytest.raises(InputError, match=f'a{end}: holds values too large'): load_volume(fn)

    def test_values_at_the_edge_are_read(self, tmp_path):
        assert load_volume(scan(tmp_path/'a.nii', [3.4e38, -3.4e38])).isfinite().all()
        # what the file says
        assert load_volume(scan(tmp_path/'b.nii', [np.inf, np.nan])).isfinite().sum()==8000-2

    def test_values_that_overflow_when_they_are_normalised(self, tmp_path):
        t = load_volume(scan(tmp_path/'a.nii', [3.3e38]*4000+[-3.3e38]*4000))
        with pytest.raises(InputError, match='a.nii: its values, from -3.3e.38 to 3.3e.38, are beyond'):
            Preprocess(normalize='minmax')(t)

    def test_a_network_that_overflows_is_not_blamed(self, learner, tmp_path):
        "On values that no network takes; a network with NaN weights is"
        learn = learner(3)
        t = TensorVolume(torch.full((1,20,20,20), 1e37), affine=np.eye(4), meta=dict(fn='a.nii'))
        pre = fastmed.all.get_preprocess(learn.dls)
        was = pre.normalize
        try:
            pre.normalize = 'none'
            with torch.no_grad(): next(learn.model.parameters()).mul_(1e30)
            with pytest.raises(InputError, match='a.nii: .*preprocessed values reach 1e.37'): learn.predict_volume(t)
        finally: pre.normalize = was
        with torch.no_grad(): next(learn.model.parameters()).fill_(float('nan'))
        with pytest.raises(InputError, match='training diverged'): learn.predict_volume(study_like(tmp_path))

def study_like(path): return load_volume(scan(path/'c.nii', []))

# --- an attack on the shared machine

@contextlib.contextmanager
def as_somebody():
    "Inside, without the rights of root; skipped where there are none to give up"
    if os.geteuid(): pytest.skip('only root may become somebody else')
    os.seteuid(12345)
    try: yield
    finally: os.seteuid(0)

@pytest.fixture
def open_path(tmp_path):
    "A folder that everybody may enter"
    for o in (tmp_path, *tmp_path.parents):
        if o==Path(tempfile.gettempdir()).resolve(): break
        o.chmod(0o755)
    if not all(o.stat().st_mode&0o5==0o5 for o in o.parents): pytest.skip('nobody else may enter the temporary folder')
    return tmp_path

class TestNoRight:
    @pytest.mark.parametrize('closed', ['b/images','b'])
    @pytest.mark.parametrize('images', ['*/images/*.nii','**/*.nii'])
    def test_a_closed_folder_is_not_passed_over(self, open_path, closed, images):
        "Its cases would be missing from every score without a word"
        for c in 'ab': write_case(open_path/c, f'c{c}')
        (open_path/closed).chmod(0)
        with as_somebody(), pytest.raises(FileError, match=f'{closed}: this folder may not be read'):
            scan_folder(open_path, images, masks=None)
        (open_path/closed).chmod(0o755)
        assert len(scan_folder(open_path, '*/images/*.nii', masks=None))==2

    def test_nor_in_a_tree_of_dicom(self, open_path):
        (open_path/'a').mkdir(mode=0)
        with as_somebody(), pytest.raises(FileError, match='a: this folder may not be read'): scan_dicom(open_path)

    def test_a_closed_file_is_not_called_damaged(self, open_path):
        fn = open_path/write_case(open_path, 'c')['image']
        fn.chmod(0)
        with as_somebody(), pytest.raises(FileError, match='c.nii: you have no permission to read it'): load_volume(fn)
        with as_somebody(): res = check_dataset(scan_folder(open_path, 'images/*.nii', masks=None), cache=open_path/'s')
        assert 'no permission' in res.to_string() and 'damaged' not in res.to_string()

class TestReplaced:
    @pytest.mark.parametrize('when', ['before','after'])
    def test_a_link_in_place_of_the_temporary_is_not_the_result(self, tmp_path, monkeypatch, when):
        "In a folder without the sticky bit others may swap it: the file is refused, not handed over"
        (tmp_path/'theirs').write_text('theirs')
        put = os.replace
        def swapped(a, b):
            put(a, b)
            b.unlink()
            b.symlink_to(tmp_path/'theirs')
        if when=='after': monkeypatch.setattr(os, 'replace', swapped)
        with pytest.raises(FileError, match='was replaced while it was written'), atomic_file(tmp_path/'t.csv') as tmp:
            tmp.write_text('mine')
            if when=='before':
                tmp.unlink()
                tmp.symlink_to(tmp_path/'theirs')
        assert (tmp_path/'theirs').read_text()=='theirs'

def test_a_scan_that_is_written_while_it_is_read(learner, study, tmp_path, monkeypatch):
    "Half of one, half of the other: no mask, and a row that says so"
    from fastmed.all import VolumeLearner
    (tmp_path/'in').mkdir()
    for i in range(2): nib.save(nib.load(study[0]/f'images/c{i}.nii'), tmp_path/f'in/c{i}.nii.gz')
    was = VolumeLearner.predict_volume
    def predict_volume(self, fn, **kwargs):
        res = was(self, fn, **kwargs)
        if 'c0' in str(fn): shutil.copy(tmp_path/'in/c1.nii.gz', tmp_path/'in/c0.nii.gz')
        return res
    monkeypatch.setattr(VolumeLearner, 'predict_volume', predict_volume)
    learn = learner(3)
    with learn.no_bar(): res = learn.predict_folder(tmp_path/'in', tmp_path/'out')
    assert res.status[1]=='ok' and 'written to while it was read' in res.status[0]
    assert [o.name for o in (tmp_path/'out').iterdir()]==['c1.nii.gz']

class TestNames:
    @pytest.mark.parametrize('end', ['.Nii','.NII','.nii.GZ','.Mha','.NRRD'])
    def test_an_ending_in_any_letters(self, tmp_path, end):
        "nibabel wrote `.Nii` under another name, and an empty file took its place"
        fn = save_volume(TensorVolume(np.arange(60.).reshape(1,3,4,5), affine=np.eye(4)), tmp_path/f'v{end}')
        assert [o.name for o in tmp_path.iterdir()]==[fn.name]
        fn.rename(tmp_path/f'w{end.lower()}')
        assert load_volume(tmp_path/f'w{end.lower()}').flatten().tolist()==list(range(60))

    def test_a_picture_keeps_no_slice_of_several(self, tmp_path):
        m = fastmed.all.TensorVolumeMask(np.ones((3,4,5), np.uint8), affine=np.eye(4))
        with pytest.raises(InputError, match='v.png: a .png holds one slice, and this scan has 5'):
            m.save(tmp_path/'v.png')
        assert not list(tmp_path.iterdir())

class TestKeptTables:
    def test_a_table_of_somebody(self, tmp_path):
        "`cohort` in a folder of one's own scans"
        from fastmed.all import cohort
        (tmp_path/'cases.csv').write_text('case,subject\np1,7\n')
        with pytest.raises(FileError, match='cases.csv: is there already'): cohort(tmp_path, n=1, spacing=8)
        assert [o.name for o in tmp_path.iterdir()]==['cases.csv']

    def test_its_own(self, tmp_path):
        from fastmed.all import cohort
        pytest.importorskip('nilearn')
        for n in (1,2,1): assert len(cohort(tmp_path, n=n, spacing=8))==n

@pytest.mark.filterwarnings('ignore')
def test_the_old_archive_stays_until_the_new_one_is_there(web, tmp_path):
    b = packed('a.tgz')
    there = untar_data(web('a.tgz', b), base=tmp_path)
    with pytest.raises(FileError, match='fewer bytes'):
        untar_data(web('a.tgz', b, len(b)//2), base=tmp_path, force_download=True)
    assert (tmp_path/'archive/a.tgz').read_bytes()==b and (there/'a.bin').stat().st_size==60_000
    untar_data(web('a.tgz', packed('a.tgz')), base=tmp_path, force_download=True)
    assert (there/'a.bin').stat().st_size==60_000
