"Cohort, phantoms and downloads: determinism, no folding, exact labels; and a hostile server on loopback"
import functools
import hashlib
import http.server
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from fastmed.data import datasets as D
from fastmed.data import downloads as W
from fastmed.data.datasets import cohort, deformation, phantom, sphere, sphere_dice
from fastmed.data.downloads import URLs, untar_data


def digests(p):
    return {str(f.relative_to(p)): hashlib.md5(f.read_bytes()).hexdigest() for f in sorted(Path(p).rglob('*'))
            if f.is_file()}

# --- cohort

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    pytest.importorskip('nilearn')
    p = tmp_path_factory.mktemp('cohort')
    return p, cohort(p, n=6, spacing=4.)

def test_cohort_files(made):
    p,df = made
    assert list(df.columns)==['case','subject','image','image_t2','mask'] and len(df)==6 and df.subject.is_unique
    csv = pd.read_csv(p/'cases.csv')
    assert list(csv.columns)==list(df.columns) and all((p/o).is_file()
            for o in csv[['image','image_t2','mask']].values.ravel())
    assert [str(p/o) for o in csv.image]==list(df.image)
    codes,oblique,scales = set(),0,[]
    for r in df.itertuples():
        t1,t2,m = (nib.load(o) for o in (r.image, r.image_t2, r.mask))
        assert t1.shape==t2.shape==m.shape and (t1.affine==m.affine).all() and (t2.affine==m.affine).all()
        assert np.allclose(t1.get_qform(), t1.get_sform(),
                atol=1e-3) and t1.header['sform_code']==t1.header['qform_code']==1
        np.testing.assert_allclose(t1.header.get_zooms(), 4, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(t1.affine[:3,:3], axis=0), 4, atol=1e-5)
        y = np.asarray(m.dataobj)
        assert y.dtype==np.uint8 and set(np.unique(y))=={0,1,2,3} and np.bincount(y.ravel())[1:].min()>1500
        codes.add(''.join(nib.aff2axcodes(t1.affine)))
        oblique += nib.affines.obliquity(t1.affine).max()>1e-3
        scales.append(np.percentile(t1.get_fdata(), 99))
    assert codes=={'RAS','LAS','PSR'} and oblique==3
    assert max(scales)/min(scales)>3

def test_contrast_and_place_agree(made):
    "In world order every head lies alike, stem below, and tissue means come in T1 and in T2 order"
    for r in made[1].itertuples():
        t1,t2,m = (nib.as_closest_canonical(nib.load(o)).get_fdata() for o in (r.image, r.image_t2, r.mask))
        a,b = [[v[m==k].mean() for k in range(4)] for v in (t1,t2)]
        assert a[0]<a[1]<a[2]<a[3] and b[1]>b[2]>b[3]>b[0]
        z = np.argwhere(m>0)[:,2]
        low = np.argwhere(m[:,:,z.min()+1]>0)
        assert len(low) < .3*(m[:,:,(z.min()+z.max())//2]>0).sum()      # The stem is below, in each orientation

def test_cohort_deterministic(made, tmp_path):
    p,_ = made
    cohort(tmp_path, n=3, spacing=4.)
    a,b = digests(p),digests(tmp_path)
    assert len(b)==10 and {k:v for k,v in a.items() if k in b and k!='cases.csv'}=={k:v for k,
            v in b.items() if k!='cases.csv'}
    c = cohort(tmp_path/'c', n=1, spacing=4., seed=1)
    assert hashlib.md5(Path(c.image[0]).read_bytes()).hexdigest()!=b['images/sub-01_T1.nii.gz']
    raw = (tmp_path/'labels/sub-01.nii.gz').read_bytes()
    assert raw[4:8]==b'\0\0\0\0' and not raw[3] & 8                        # No time, no name in the gzip header

def test_subjects_differ(made):
    ys = [nib.as_closest_canonical(nib.load(o)).get_fdata() for o in made[1]['mask']]
    d = [(2*((a==2)&(b==2)).sum())/((a==2).sum()+(b==2).sum()) for i,a in enumerate(ys) for b in ys[:i]]
    assert max(d)<.85

def test_unfinished_case_is_remade(made, tmp_path):
    p,_ = made
    cohort(tmp_path, n=2, spacing=4.)
    want = digests(tmp_path)
    cut = tmp_path/'images/sub-01_T2.nii.gz'
    cut.write_bytes(cut.read_bytes()[:5000])
    (tmp_path/'labels/sub-02.nii.gz').unlink()
    (tmp_path/'images/sub-02_T1.nii.gz').write_bytes(b'')
    cohort(tmp_path, n=2, spacing=4.)
    assert digests(tmp_path)==want

def test_cohort_of_other_arguments_is_not_given(made):
    p,_ = made
    for kw in (dict(seed=1, spacing=4.), dict(spacing=5.)):
        with pytest.raises(ValueError, match='another path'): cohort(p, n=2, **kw)

@pytest.mark.parametrize('kw', [dict(n=0), dict(n=2.5), dict(spacing=0), dict(spacing=-1), dict(spacing=float('nan')),
        dict(seed=-1), dict(seed='a')])
def test_cohort_refuses(tmp_path, kw):
    with pytest.raises(ValueError, match='expected'): cohort(tmp_path/'x', **kw)
    assert not (tmp_path/'x').exists()

def test_cohort_without_nilearn(tmp_path, monkeypatch):
    monkeypatch.setattr(D.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "fastmed\[demo\]"'): cohort(tmp_path, n=1)

def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt): D._replace(tmp_path/'a.nii.gz', b'123')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('seed', range(25))
def test_no_folding(seed):
    phi,jac = deformation((40,48,40), 4., seed=[0,seed])
    assert jac.min()>.2
    num = np.linalg.det(np.stack(np.gradient(phi.astype(float), 4., axis=(1,2,3)), -1).transpose(1,2,3,0,4))
    assert num.min()>0

def test_no_folding_is_enforced():
    strong = dict(shape=(40,48,40), spacing=4., seed=3, sd=(20,10))
    assert deformation(**strong)[1].min()>.2
    with pytest.raises(ValueError, match='min_jacobian'): deformation(**strong, min_jacobian=5)
    with pytest.raises(ValueError, match='knots'): deformation((4,4,4), knots=(40,), sd=(1,2))

def test_jacobian_is_exact():
    phi,jac = deformation((40,40,40), .5, seed=1)
    num = np.linalg.det(np.stack(np.gradient(phi.astype(float), .5, axis=(1,2,3)), -1).transpose(1,2,3,0,4))
    np.testing.assert_allclose(jac[1:-1,1:-1,1:-1], num[1:-1,1:-1,1:-1], atol=5e-3)

def test_deformation_same_at_any_spacing():
    a,b = deformation((21,25,21), 8., seed=5)[0], deformation((41,49,41), 4., seed=5)[0][:,::2,::2,::2]
    np.testing.assert_allclose(a, b, atol=1e-3)

# --- phantoms

@pytest.mark.parametrize('spacing', [1., (.5,1,2), (1,1,3)])
def test_sphere_volume_and_dice(spacing):
    sp = np.array([spacing]*3 if np.ndim(spacing)==0 else spacing)
    shape = tuple((70/sp).astype(int))
    a,b = (sphere(shape, c, r, spacing) for c,r in (((31.2,33.1,34.3),18), ((39.2,33.1,34.3),15)))
    assert a.dtype==np.uint8 and a.shape==shape
    assert a.sum()*sp.prod()==pytest.approx(4/3*np.pi*18**3, rel=.01)
    assert 2*(a&b).sum()/(a.sum()+b.sum())==pytest.approx(sphere_dice(18,15,8), abs=.01)

def test_sphere_surface_distance():
    from scipy.ndimage import distance_transform_edt
    a,b = sphere((64,64,64), None, 20), sphere((64,64,64), None, 14)
    edge = (b>0)&(distance_transform_edt(b)<=1)
    assert distance_transform_edt(a)[edge].mean()==pytest.approx(6, abs=1)
    assert sphere((41,31), None, 10).sum()==pytest.approx(np.pi*100, rel=.03)

def test_sphere_dice_limits():
    assert sphere_dice(10,10)==1 and sphere_dice(10,5,15)==0 and sphere_dice(10,
            5)==pytest.approx(2*125/1125) and sphere_dice(10,5,5)==pytest.approx(2*125/1125)
    with pytest.raises(ValueError, match='axes'): sphere((8,8,8), (1,1), 3)
    with pytest.raises(ValueError, match='axes'): sphere((8,8,8), None, 3, (1,1))

@pytest.mark.parametrize('aff',
                         [np.diag([1,1,1,1]), np.diag([-2,1,1.5,1]),
                          np.array([[0,0,2,5],[-1,0,0,7],[0,1.2,0,-9],[0,0,0,1]]),
                          np.array([[.9,-.2,0,3],[.2,.9,.1,4],[0,-.1,.95,5],[0,0,0,1]])])
def test_phantom_known_in_the_world(aff):
    img,m = phantom((48,40,44), aff, seed=2, radius=8.)
    assert (img.affine==aff).all() and (m.affine==aff).all() and img.shape==m.shape==(48,40,44)
    y,vox = np.asarray(m.dataobj), abs(np.linalg.det(aff[:3,:3]))
    assert (y==1).sum()*vox==pytest.approx(4/3*np.pi*8**3,
                                           rel=.03) and (y==2).sum()*vox==pytest.approx(4/3*np.pi*3.6**3, rel=.1)
    c = [nib.affines.apply_affine(aff, np.argwhere(y==k)).mean(0) for k in (1,2)]
    np.testing.assert_allclose(c[1]-c[0], 1.15*1.4*8/np.sqrt(3), atol=.4)
    assert (phantom((48,40,44), aff, 2, radius=8.)[0].get_fdata()==img.get_fdata()).all() and not (phantom((48,40,44),
            aff, 3, radius=8.)[0].get_fdata()==img.get_fdata()).all()

def test_phantom_refuses():
    with pytest.raises(ValueError, match='does not fit'): phantom(radius=20.)
    with pytest.raises(ValueError, match='invertible'): phantom(affine=np.zeros((4,4)))
    with pytest.raises(ValueError, match='three'): phantom((8,8))

# --- downloads

class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self):
        self.server.hits.append(self.path)
        if not self.path.startswith(('/short','/slow')): return super().do_GET()
        body = (Path(self.directory)/'good.tar').read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body)//2])
        self.wfile.flush()
        if self.path.startswith('/slow'): self.server.go.wait(30)
        self.close_connection = True

def tar(fn, members, mode='w'):
    "members: (name, bytes) or a TarInfo"
    with tarfile.open(fn, mode) as t:
        for m in members:
            if isinstance(m, tarfile.TarInfo):
                t.addfile(m)
                continue
            i = tarfile.TarInfo(m[0])
            i.size = len(m[1])
            i.mode = 0o777
            t.addfile(i, io.BytesIO(m[1]))

def special(name, kind, link=''):
    i = tarfile.TarInfo(name)
    i.type = kind
    i.linkname = link
    return i

@pytest.fixture
def web(tmp_path, monkeypatch):
    for o in ('FASTMED_DATA','FASTMED_HOME'): monkeypatch.delenv(o, raising=False)
    www = tmp_path/'www'
    www.mkdir()
    tar(www/'good.tar', [('good/dataset.json', b'{}'), ('good/imagesTr/a.nii.gz', os.urandom(60_000)),
            ('good/imagesTr/._a.nii.gz', b'fork'), ('._good', b'fork')])
    srv = http.server.ThreadingHTTPServer(('127.0.0.1',0), functools.partial(Handler, directory=str(www)))
    srv.hits,srv.go = [],threading.Event()
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    class W: pass
    w = W()
    w.www,w.srv,w.home = www,srv,tmp_path/'home'
    w.url = lambda n: f'http://127.0.0.1:{srv.server_port}/{n}'
    w.md5 = lambda n: hashlib.md5((www/n).read_bytes()).hexdigest()
    w.get = lambda n, sum=None, **kw: untar_data(w.url(n), base=w.home, checksum=sum or w.md5(n), **kw)
    w.left = lambda: sorted(str(f.relative_to(w.home)) for f in w.home.rglob('*') if f.is_file() and f.suffix!='.lock')
    yield w
    srv.go.set()
    srv.shutdown()
    srv.server_close()

def names(p): return sorted(str(f.relative_to(p)) for f in p.rglob('*') if f.is_file() and f.name!='.checksum')

def test_good_download(web):
    p = web.get('good.tar')
    assert p==web.home/'data/good' and names(p)==['dataset.json','imagesTr/a.nii.gz']
    assert web.get('good.tar')==p and web.srv.hits==['/good.tar']              # Once
    (p/'dataset.json').write_text('changed')
    assert web.get('good.tar', force_download=True)==p and (p/'dataset.json').read_text()=='{}' and len(web.srv.hits)==2
    assert web.left()==['archive/good.tar','data/good/.checksum','data/good/dataset.json','data/good/imagesTr/a.nii.gz']
    assert not stat.S_IMODE((p/'dataset.json').stat().st_mode) & 0o111         # Modes of the archive are not taken

@pytest.mark.parametrize('name,mode', [('x.tar.gz','w:gz'), ('x.tgz','w:gz'), ('x.tar','w')])
def test_kinds_of_tar(web, name, mode):
    tar(web.www/name, [('one/a.txt', b'a'), ('b.txt', b'b')], mode)
    p = web.get(name, hashlib.sha256((web.www/name).read_bytes()).hexdigest())  # SHA-256 as well
    assert p==web.home/'data/x' and names(p)==['b.txt','one/a.txt']

def test_zip(web):
    with zipfile.ZipFile(web.www/'z.zip','w') as z:
        z.writestr('z/a.txt','a')
        z.writestr('__MACOSX/z/._a.txt','fork')
    assert names(web.get('z.zip'))==['a.txt']
    for bad in ('../evil.txt','/evil.txt','z/../../evil.txt','C:/evil.txt','..\\evil.txt'):
        with zipfile.ZipFile(web.www/'bad.zip','w') as z:
            z.writestr('z/a.txt','a')
            z.writestr(zipfile.ZipInfo(bad),'evil')
        with pytest.raises(ValueError, match='leads out'): web.get('bad.zip')
    i = zipfile.ZipInfo('z/link')
    i.external_attr = (stat.S_IFLNK|0o777)<<16
    with zipfile.ZipFile(web.www/'link.zip','w') as z: z.writestr(i,'/etc/passwd')
    with pytest.raises(ValueError, match='a link'): web.get('link.zip')
    assert not (web.home/'data/bad').exists() and not list(web.home.parent.rglob('evil*'))

def test_wrong_checksum(web):
    with pytest.raises(ValueError) as e: web.get('good.tar', '0'*32)
    for o in (web.url('good.tar'), '0'*32, web.md5('good.tar'), 'call untar_data again'): assert o in str(e.value)
    assert web.left()==[] and not (web.home/'data/good').exists()
    assert web.get('good.tar').is_dir()

def test_truncated_body(web):
    with pytest.raises(OSError, match='short.tar.*download stopped'): web.get('short.tar', web.md5('good.tar'))
    assert not (web.home/'data/short').exists() and not (web.home/'archive/short.tar').exists()

def test_missing_page_and_dead_server(web):
    with pytest.raises(OSError, match='nothing.tar.*download stopped'): web.get('nothing.tar', '0'*32)
    with pytest.raises(OSError, match='download stopped'):
        untar_data('http://127.0.0.1:9/x.tar', base=web.home, checksum='0'*32)
    assert web.left()==[]

@pytest.mark.parametrize('bad', [('../evil.txt', b'evil'), ('/tmp/fastmed_evil.txt', b'evil'),
        ('a/../../evil.txt', b'evil'), ('a\\..\\evil.txt', b'evil'),
    special('a/link', tarfile.SYMTYPE, '/etc/passwd'), special('a/link', tarfile.SYMTYPE, 'b.txt'),
        special('a/hard', tarfile.LNKTYPE, 'a/ok.txt'),
    special('a/fifo', tarfile.FIFOTYPE), special('a/dev', tarfile.CHRTYPE)], ids=lambda b: b[0] if isinstance(b, tuple)
    else f'{b.type}{b.linkname}')
def test_unsafe_tar(web, bad):
    tar(web.www/'evil.tar', [('a/ok.txt', b'ok'), bad])
    with pytest.raises(ValueError, match='evil.tar.*nothing was unpacked'): web.get('evil.tar')
    assert not list((web.home/'data').iterdir())                               # Not even the good member
    assert not list(web.home.rglob('evil.txt')) and not Path('/tmp/fastmed_evil.txt').exists()

def test_not_an_archive(web):
    (web.www/'page.tar').write_text('<html>come back later</html>')
    (web.www/'none.tar').write_bytes(bytes(10240))
    with pytest.raises(ValueError, match='neither tar nor zip'): web.get('page.tar')
    with pytest.raises(ValueError, match='empty|neither'): web.get('none.tar')
    assert not list((web.home/'data').iterdir())

def test_killed_half_way(web):
    code = (f"from fastmed.data.downloads import untar_data; untar_data({web.url('slow/good.tar')!r}, "
            f"base={str(web.home)!r}, checksum={web.md5('good.tar')!r})")
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          cwd=Path(__file__).parents[1])
    for _ in range(600):
        if any('.part' in o and (web.home/o).stat().st_size for o in web.left()): break
        time.sleep(.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert web.left() and all('.part' in o for o in web.left())                # Part of an archive, under another name
    web.srv.go.set()
    (web.www/'slow').mkdir()
    with pytest.raises(OSError): web.get('slow/good.tar', web.md5('good.tar'))  # The slow server never sends the rest
    # The same file name, from a server that does
    got = web.get('good.tar')
    assert names(got)==['dataset.json','imagesTr/a.nii.gz'] and not [o for o in web.left() if '.part' in o
            and not o.startswith('archive/')]

def test_stopped_while_unpacking(web, monkeypatch):
    real,count = tarfile.TarFile.extractfile,[]
    def stop(self, *a, **kw):
        count.append(1)
        if len(count)==2: raise KeyboardInterrupt
        return real(self, *a, **kw)
    with monkeypatch.context() as m:
        m.setattr(tarfile.TarFile, 'extractfile', stop)
        with pytest.raises(KeyboardInterrupt): web.get('good.tar')
    assert not list((web.home/'data').iterdir())
    (web.home/'data/good.part').mkdir()
    (web.home/'data/good.part/junk').write_text('from a killed process')
    assert names(web.get('good.tar'))==['dataset.json','imagesTr/a.nii.gz'] and len(web.srv.hits)==1

def test_broken_archive_on_disk_is_fetched_again(web):
    (web.home/'archive').mkdir(parents=True)
    (web.home/'archive/good.tar').write_bytes(b'half')
    assert names(web.get('good.tar'))==['dataset.json','imagesTr/a.nii.gz']

def test_two_at_once(web):
    out = []
    ts = [threading.Thread(target=lambda: out.append(web.get('good.tar'))) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert out==[web.home/'data/good']*4 and web.srv.hits==['/good.tar']

def test_other_checksum_than_unpacked(web):
    web.get('good.tar')
    with pytest.raises(ValueError, match='force_download'): web.get('good.tar', '1'*32)
    with pytest.raises(ValueError, match='32 hexadecimal'): web.get('good.tar', 'abc')

def test_places(web, monkeypatch, tmp_path):
    assert web.get('good.tar', data=tmp_path/'d',
            archive=tmp_path/'a')==tmp_path/'d/good' and (tmp_path/'a/good.tar').is_file() and not web.home.exists()
    monkeypatch.setenv('FASTMED_HOME', str(tmp_path/'h'))
    assert untar_data(web.url('good.tar'), checksum=web.md5('good.tar'))==tmp_path/'h/data/good'
    monkeypatch.delenv('FASTMED_HOME')
    monkeypatch.setattr(W.external, 'fastai_path', lambda key: tmp_path/'fastai'/key)
    assert untar_data(web.url('good.tar'), checksum=web.md5('good.tar'))==tmp_path/'fastai/data/good'

def test_an_address_without_a_checksum_gets_the_same_care(web):
    with pytest.warns(UserWarning, match='no checksum was given.*[0-9a-f]{64}'):
        p = untar_data(web.url('good.tar'), base=web.home)
    assert names(p)==['dataset.json','imagesTr/a.nii.gz'] and untar_data(web.url('good.tar'),
            base=web.home)==p and len(web.srv.hits)==1
    tar(web.www/'evil.tar', [('a/ok.txt', b'ok'), ('../evil.txt', b'evil')])
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='leads out'):
        untar_data(web.url('evil.tar'), base=web.home)
    assert not list(web.home.parent.rglob('evil.txt')) and not (web.home/'data/evil').exists()

def test_decathlon_url_is_verified(web, monkeypatch):
    "A task's URL carries its own checksum: what the server holds now is refused"
    monkeypatch.setattr(URLs, 'HEART', web.url('good.tar'))
    with pytest.raises(ValueError, match='06ee59366e1e5124267b774dbd654057'): untar_data(URLs.HEART, base=web.home)

def test_fastmed_data(monkeypatch, tmp_path, web):
    (tmp_path/'shared/hippocampus').mkdir(parents=True)
    (tmp_path/'shared/hepatic_vessel').mkdir()
    monkeypatch.setenv('FASTMED_DATA', str(tmp_path/'shared'))
    assert untar_data(URLs.HIPPOCAMPUS)==tmp_path/'shared/hippocampus' and untar_data(
            URLs.HEPATIC_VESSEL).name=='hepatic_vessel'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('FASTMED_DATA', 'shared')
    assert untar_data(URLs.HIPPOCAMPUS).is_absolute()
    monkeypatch.setattr(URLs, 'SPLEEN', web.url('good.tar'))                   # Not in the folder: fetched
    with pytest.raises(ValueError, match='410d4a301da4e5b2f6f86ec3ddba524e'): untar_data(URLs.SPLEEN, base=web.home)

def test_fastai_urls_still_work(monkeypatch):
    from fastai.data import external
    assert issubclass(URLs, external.URLs) and URLs.PETS==external.URLs.PETS
    assert not [o for o in vars(URLs) if not o.startswith('_') and hasattr(external.URLs, o)]
    seen = {}
    monkeypatch.setattr(external, 'untar_data', lambda url, **kw: seen.update(kw, url=url) or 'theirs')
    assert untar_data(URLs.MNIST_TINY, data='d', force_download=True)=='theirs' and seen==dict(url=URLs.MNIST_TINY,
            archive=None, data='d', c_key='data', force_download=True, base=None)

def test_md5_as_monai_has_them():
    monai = pytest.importorskip('monai.apps.datasets').DecathlonDataset
    for n,url in monai.resource.items(): assert W._known_url(url)[1]==monai.md5[n]

def test_light_import():
    code = ("import sys, fastmed.data.datasets; print([m for m in "
            "('nilearn','scipy.ndimage','sklearn','monai','torchio') if m in sys.modules and m not in base])")
    code = "import sys; import fastai.data.all; base=set(sys.modules)\n" + code
    assert subprocess.run([sys.executable,'-c',code], capture_output=True, text=True,
                           cwd=Path(__file__).parents[1]).stdout.strip()=='[]'
