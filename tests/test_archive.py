"""Archives from strangers: nothing outside the folder, no links, no devices, no bombs, no two members that are one file
elsewhere; and whole or not at all."""
import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile

import pytest

from fastmed.core import FastmedError, FileError, InputError, ResourceError
from fastmed.io.guard import unpack_safely


def tar(fn, *members, fmt=tarfile.PAX_FORMAT, pack=lambda b: b):
    "(name, bytes), (name, type, link target) or a TarInfo"
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w', format=fmt) as t:
        for m in members:
            i = m if isinstance(m, tarfile.TarInfo) else tarfile.TarInfo(m[0])
            if m is not i and len(m)==2: i.size = len(m[1])
            elif m is not i: i.type,i.linkname = m[1:]
            t.addfile(i, io.BytesIO(m[1]) if m is not i and len(m)==2 else None)
    fn.write_bytes(pack(f.getvalue()))
    return fn
def zipped(fn, *members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(fn, 'w', method) as z:
        for n,b,*attr in members:
            i = zipfile.ZipInfo('x')
            i.filename,i.compress_type = n,method
            if attr: i.external_attr = attr[0]
            z.writestr(i, b)
    return fn

@pytest.fixture
def place(tmp_path):
    "(folder for archives, destination two folders down, check that nothing lies anywhere)"
    dest = tmp_path/'a'/'b'/'dest'
    dest.parent.mkdir(parents=True)
    src = tmp_path/'src'
    src.mkdir()
    def clean():
        assert not dest.exists() and {o for o in tmp_path.rglob('*') if src not in o.parents}=={src,dest.parent,
                                                                dest.parent.parent}
    return src,dest,clean

GOOD = (('x/a.txt',b'1'), ('x/ü b.txt',b'22'), ('x/d/e.txt',b'333'*5000))
@pytest.mark.parametrize('pack', (lambda b: b, gzip.compress, bz2.compress, lzma.compress))
@pytest.mark.parametrize('fmt', (tarfile.USTAR_FORMAT,tarfile.GNU_FORMAT,tarfile.PAX_FORMAT))
def test_good_tars(place, pack, fmt):
    src,dest,_ = place
    unpack_safely(tar(src/'x.tar', *GOOD, ('x/'+'long'*22,b'l'), fmt=fmt, pack=pack), dest)
    assert {str(o.relative_to(dest)):o.read_bytes() for o in dest.rglob('*') if o.is_file()}=={**dict(GOOD),
            'x/'+'long'*22:b'l'}

@pytest.mark.parametrize('method', (0,8,12,14))
def test_good_zips(place, method):
    src,dest,_ = place
    unpack_safely(zipped(src/'x.zip', *GOOD, ('__MACOSX/x/._a.txt',b'fork'), ('x\\w.txt',b'w'), ('x/',b''),
            method=method), dest)
    assert {o.relative_to(dest).as_posix():o.read_bytes() for o in dest.rglob('*') if o.is_file()}=={**dict(GOOD),
            'x/w.txt':b'w'}

OUT = ('../x', 'a/../../x', 'a/..', '/x', '//x', '\\x', '\\\\host\\share\\x', 'C:\\x', 'C:x', 'c:/x', 'a\\..\\..\\x',
       '..\\x')
ODD = ('a\nb', 'a\x1bb', 'a\u202etxt.exe', 'a'*300, 'x/'*60+'y', '/'.join(['long'*40]*20))
@pytest.mark.parametrize('name', OUT+ODD, ids=lambda n: repr(n)[:24])
@pytest.mark.parametrize('kind', ('tar','zip'))
def test_names_that_are_refused(place, name, kind):
    src,dest,clean = place
    f = (tar if kind=='tar' else zipped)(src/'x', ('good.txt',b'1'), (name,b'evil'))
    with pytest.raises(InputError, match='leads out' if name in OUT else 'control characters|too long') as e:
        unpack_safely(f, dest)
    assert str(f) in str(e.value) and 'nothing was unpacked' in str(e.value) and len(str(e.value))<600
    clean()

@pytest.mark.parametrize('kind', ('tar','zip'))
@pytest.mark.parametrize('names', (('a.txt','a.txt'), ('a.txt','A.TXT'), ('é','e\u0301'), ('a','a/b'), ('a/b','a'),
        ('d/X/1','d/x'), ('straße','STRASSE'), ('a/./b','a//b')), ids=str)
def test_two_names_that_are_one_elsewhere(place, kind, names):
    src,dest,clean = place
    with pytest.raises(InputError, match='capitals|one name'):
        unpack_safely((tar if kind=='tar' else zipped)(src/'x', *((n,b'1') for n in names)), dest)
    clean()

@pytest.mark.parametrize('typ', (tarfile.SYMTYPE,tarfile.LNKTYPE,tarfile.CHRTYPE,tarfile.BLKTYPE,tarfile.FIFOTYPE))
@pytest.mark.parametrize('to', ('/etc/passwd','../..','good.txt'))
def test_links_and_devices_of_a_tar(place, typ, to):
    src,dest,clean = place
    with pytest.raises(InputError, match='a link or a device'):
        unpack_safely(tar(src/'x', ('good.txt',b'1'), ('l',typ,to), ('l/x',b'through the link')), dest)
    clean()

@pytest.mark.parametrize('mode', (stat.S_IFLNK,stat.S_IFCHR,stat.S_IFIFO,stat.S_IFSOCK))
def test_links_and_devices_of_a_zip(place, mode):
    src,dest,clean = place
    with pytest.raises(InputError, match='a link or a device'):
        unpack_safely(zipped(src/'x', ('good.txt',b'1'), ('l',b'/etc/passwd',(mode|0o777)<<16)), dest)
    clean()

def test_modes_are_not_kept(place):
    src,dest,_ = place
    i = tarfile.TarInfo('run')
    i.mode,i.uid = 0o6777,0
    unpack_safely(tar(src/'x', i), dest)
    unpack_safely(zipped(src/'z', ('run2',b'x',0o106777<<16)), dest)
    for n in ('run','run2'): assert not (dest/n).stat().st_mode & 0o6111

# ---- bombs

@pytest.mark.parametrize('pack', (gzip.compress, bz2.compress, lzma.compress))
def test_a_tar_that_unpacks_to_too_much(place, pack):
    src,dest,clean = place
    with pytest.raises(InputError, match='more than 0.005 GB'):
        unpack_safely(tar(src/'x', ('a',bytes(4_000_000)), ('b',bytes(4_000_000)), pack=pack), dest, most=5_000_000)
    clean()

def test_a_zip_that_unpacks_to_too_much(place):
    src,dest,clean = place
    f = zipped(src/'x', *((f'{i}',bytes(10**6)) for i in range(20)))
    with pytest.raises(InputError, match='more than 0.01 GB'): unpack_safely(f, dest, most=10**7)
    clean()

def declared(fn, size, method=8):
    "A zip whose one member says that it holds `size` bytes and holds 100,000"
    zipped(fn, ('a',bytes(100_000)), method=method)
    b = bytearray(fn.read_bytes())
    for sig,at in ((b'PK\3\4',22), (b'PK\1\2',24)):
        i = b.index(sig)
        b[i+at:i+at+4] = size.to_bytes(4, 'little')
    fn.write_bytes(b)
    return fn

@pytest.mark.parametrize('size', (1,99_999,100_001,2**31,2**32-2))
def test_a_zip_that_lies_about_its_sizes(place, size):
    src,dest,clean = place
    with pytest.raises(FastmedError, match='x'): unpack_safely(declared(src/'x', size), dest)
    assert not dest.exists() or sum(o.stat().st_size for o in dest.rglob('*'))<=100_000

@pytest.mark.parametrize('field', (b'77777777777\0', b'\x80\0\0\0\x7f'+b'\xff'*7, b'-0000000001\0', b'\xff'*12))
def test_a_tar_that_lies_about_its_sizes(place, field):
    src,dest,clean = place
    b = bytearray(tar(src/'x', ('a',b'1'*600)).read_bytes())
    b[124:136] = field
    b[148:156] = b' '*8
    b[148:156] = b'%06o\0 '%sum(b[:512])
    (src/'x').write_bytes(b)
    with pytest.raises(FastmedError, match='x'): unpack_safely(src/'x', dest)
    clean()

def test_many_members(place, monkeypatch):
    import fastmed.io.guard as A
    src,dest,clean = place
    monkeypatch.setattr(A, '_most_files', 50)
    with pytest.raises(InputError, match='more than 50 files'):
        unpack_safely(zipped(src/'x', *((f'{i}',b'') for i in range(60))), dest)
    clean()

def test_a_disk_that_is_too_small(place, monkeypatch):
    import fastmed.io.guard as A
    src,dest,clean = place
    monkeypatch.setattr(A.shutil, 'disk_usage', lambda p: type('U', (), dict(free=1000))())
    with pytest.raises(ResourceError, match='Free some space'): unpack_safely(zipped(src/'x', ('a',bytes(2000))), dest)
    clean()

@pytest.mark.parametrize('typ', (b'x',b'g',b'L',b'K'))
def test_a_header_of_gigabytes_is_not_read(place, typ):
    "Names and comments of a tar are read into memory at once: 300 MB of them, in 300 kB"
    src,dest,clean = place
    n = 300_000_000
    i = tarfile.TarInfo('a')
    i.type,i.size = typ,n
    with gzip.open(src/'x', 'wb', 1) as f:
        f.write(i.tobuf(tarfile.GNU_FORMAT))
        for _ in range(n//10**6): f.write(bytes(10**6))
    import tracemalloc
    tracemalloc.start()
    try:
        with pytest.raises(FastmedError, match='x'): unpack_safely(src/'x', dest)
        assert tracemalloc.get_traced_memory()[1]<50e6
    finally: tracemalloc.stop()
    clean()

def test_a_sparse_file_is_refused(place):
    src,dest,clean = place
    i = tarfile.TarInfo('hole')
    i.size = 0
    i.pax_headers = {'GNU.sparse.major':'0', 'GNU.sparse.minor':'1', 'GNU.sparse.name':'hole',
                     'GNU.sparse.size':str(10**15), 'GNU.sparse.map':'0,0'}
    with pytest.raises(FastmedError): unpack_safely(tar(src/'x', i), dest)
    clean()

# ---- damage

@pytest.mark.parametrize('share', (.02,.3,.6,.9))
@pytest.mark.parametrize('kind', ('tar','gz','xz','zip'))
def test_cut_short(place, kind, share):
    src,dest,_ = place
    big = [(f'{i}.bin',os.urandom(3000)) for i in range(8)]
    f = zipped(src/'x', *big) if kind=='zip' else tar(src/'x', *big,
                                                      pack=dict(tar=lambda b: b, gz=gzip.compress,
                                                                xz=lzma.compress)[kind])
    b = f.read_bytes()
    b = b[:b.rindex(big[-1][1])+2900] if kind=='tar' and share==.9 else b[:int(len(b)*share)]
    f.write_bytes(b)
    with pytest.raises((FileError,InputError), match='x'): unpack_safely(f, dest)

def test_encrypted_and_empty_and_none(place):
    src,dest,clean = place
    b = bytearray(zipped(src/'x', ('a',b'1')).read_bytes())
    for sig,at in ((b'PK\3\4',6), (b'PK\1\2',8)): b[b.index(sig)+at] |= 1
    (src/'x').write_bytes(b)
    with pytest.raises(InputError, match='encrypted'): unpack_safely(src/'x', dest)
    for b in (b'', b'<html>', b'PK\3\4', gzip.compress(b'no tar'), b'\x1f\x8b\x08', b'BZh9', b'\xfd7zXZ\0'):
        (src/'x').write_bytes(b)
        with pytest.raises((FileError,InputError), match='x'): unpack_safely(src/'x', dest)
    clean()
