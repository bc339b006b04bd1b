"""Broken on purpose. A few hundred mutated files of every kind that fastmed reads (benchmarks/fuzz.py makes 20,000),
the very files that once crashed or hung a library, and headers that promise what neither file nor memory holds.

Everything is read in a child process: a crash of a library in C is a failed test, not the end of all tests."""
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from phantoms import python

ROOT = Path(__file__).parents[1]

@pytest.mark.slow
def test_mutated_files(tmp_path):
    "Each is read rightly or refused by name; none crashes, hangs, or takes more than 3 GB"
    env = {**os.environ, 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'OMP_NUM_THREADS':'1',
           'FASTMED_CACHE':str(tmp_path)}
    r = subprocess.run([sys.executable, ROOT/'benchmarks'/'fuzz.py', '--quick', '--json'], capture_output=True,
                        text=True, env=env, cwd=tmp_path, timeout=1800)
    out = json.loads(r.stdout.strip().splitlines()[-1])
    bad = {k:v for k,v in out['bad'].items() if v}
    assert not bad, '\n'.join(f'{k} {n}: {m}' for k,v in bad.items() for n,m in v)
    rows = {o['reader']:o for o in out['rows']}
    assert r.returncode==0 and sum(o['files'] for o in rows.values())>=500 and len(rows)>=19
    for k,o in rows.items():
        assert o['read']>0 and (o['refused']>0
                or k=='store') or o['files']<10, f'{k} {o}: a reader that refuses everything, or nothing, shows nothing'

# ---- what once went wrong

MHA = (b'ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = '
       b'False\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 4 '
       b'3 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n')
NRRD = (b'NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 4 3 2\nspace directions: (1,0,0) '
        b'(0,1,0) (0,0,1)\nkinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: '
        b'(0,0,0)\n\n')
VOX = np.arange(24, dtype='<i2').tobytes()
def tiff(next_page=0, w=4, h=6, at=None, kind=None):
    "A TIFF of one strip; its next page is `next_page`"
    e = [*([] if kind is None else [(254,4,1,kind)]),(256,4,1,w),(257,4,1,h),(258,3,1,16),(259,3,1,1),(262,3,1,1),
         (273,4,1,8 if at is None else at),(277,3,1,1),(278,4,1,h),(279,4,1,48)]
    return b'II*\0'+struct.pack('<I', 56)+VOX+struct.pack('<H', len(e))+b''.join(struct.pack('<HHII', *o)
            for o in e)+struct.pack('<I', next_page)
ONCE = { # name: (suffix, bytes): it crashed, hung, or was read as something else
    'NDims beyond every array': ('.mha', MHA.replace(b'NDims = 3', b'NDims = 16777216')+VOX),
        'a file name for sprintf': ('.mhd', MHA.replace(b'LOCAL', b'%s%n%s')+VOX),
        'numbered files for sprintf': ('.mhd', MHA.replace(b'LOCAL', b'x%03d.raw 1 2 1')+VOX),
    'a list of files': ('.mhd', MHA.replace(b'LOCAL', b'LIST')+b'/etc/passwd\n'),
        'voxels of another folder': ('.mhd', MHA.replace(b'LOCAL', b'../../../../etc/passwd')),
        'voxels of a device': ('.mhd', MHA.replace(b'LOCAL', b'/dev/zero')),
        'an image of noughts': ('.mha', MHA.replace(b'4 3 2', b'4 0 2')+VOX),
    'fewer sizes than axes': ('.mha', MHA.replace(b'4 3 2', b'4 3')+VOX), 'voxels cut off': ('.mha', MHA+VOX[:-2]),
        'spacing that is none': ('.mha', MHA.replace(b'ElementSpacing = 1 1 1', b'ElementSpacing = 1 nan 1')+VOX),
        'an infinite turn': ('.mha', MHA.replace(b'1 0 0 0 1 0 0 0 1', b'1e400 0 0 0 1 0 0 0 1')+VOX),
    'a scene': ('.mha', MHA.replace(b'= Image', b'= Scene')+VOX), 'a field twice': ('.mha', b'NDims = 2\n'+MHA+VOX),
        'nrrd: axes without end': ('.nrrd', NRRD.replace(b'dimension: 3', b'dimension: 16')+VOX),
        'nrrd: data of a device': ('.nhdr', NRRD.replace(b'encoding: raw', b'encoding: raw\ndata file: /dev/zero')),
    'nrrd: numbered files': ('.nhdr', NRRD.replace(b'encoding: raw', b'encoding: raw\ndata file: x%03d.raw 1 2 1')),
        'nrrd: block type': ('.nrrd', NRRD.replace(b'type: short', b'type: block')+VOX),
        'nrrd: cut off': ('.nrrd', NRRD+VOX[:-1]),
        'nrrd: skip into nowhere': ('.nrrd', NRRD.replace(b'encoding: raw', b'encoding: raw\nbyte skip: 99999')+VOX),
    'nrrd: an unknown encoding': ('.nrrd', NRRD.replace(b'raw', b'bzip2')+VOX),
        'tiff: a page that follows itself': ('.tif', tiff(56)), 'tiff: a page of no kind': ('.tif', tiff(kind=2**32-2)),
        'tiff: nothing but a small copy': ('.tif', tiff(kind=1)),
        'tiff: a strip beyond the end': ('.tif', tiff(at=9999)), 'tiff: no rows': ('.tif', tiff(h=0)),
        'a format that nobody asked for': ('.gipl', b'\0'*400),
        'vtk by another name': ('.vtk', b'# vtk DataFile Version 3.0\nx\nASCII\n')}

@pytest.fixture(scope='module')
def once(tmp_path_factory):
    "What is said of each of `ONCE`: a child process reads them all"
    d = tmp_path_factory.mktemp('once')
    for i,(sfx,b) in enumerate(ONCE.values()): (d/f'{i}{sfx}').write_bytes(b)
    return json.loads(python("""
import json, sys
from pathlib import Path
from fastmed.core import FastmedError
from fastmed.io.volumes import load_volume, read_header
res = {}
for p in sorted(Path(sys.argv[1]).iterdir()):
    if p.suffix=='.py': continue
    for f in (read_header, load_volume):
        try:
            f(p)
            res[p.stem] = 'read'
        except FastmedError as e: res[p.stem] = str(e)
        except Exception as e:
            res[p.stem] = f'{type(e).__name__}: {e}'
            break
print(json.dumps(res))
""", d).splitlines()[-1])

@pytest.mark.parametrize('i', range(len(ONCE)), ids=list(ONCE))
def test_what_once_went_wrong(once, i):
    msg = once[str(i)]
    sfx = list(ONCE.values())[i][0]
    assert f'{i}{sfx}' in msg and len(msg)<600 and not msg.startswith(('ValueError','TypeError','RuntimeError')), msg

def test_the_good_ones_are_read(tmp_path):
    "The same files without the fault"
    from fastmed.io.volumes import load_volume, read_header
    for sfx,b in (('.mha',MHA+VOX), ('.nrrd',NRRD+VOX), ('.mhd',MHA.replace(b'LOCAL', b'v.raw')),
            ('.nhdr',NRRD.replace(b'encoding: raw', b'encoding: raw\ndata file: v.raw')), ('.tif',tiff())):
        (tmp_path/f'x{sfx}').write_bytes(b)
        (tmp_path/'v.raw').write_bytes(VOX)
        t = load_volume(tmp_path/f'x{sfx}')
        assert t.shape==((1,4,6,1) if sfx=='.tif'
                else (1,4,3,2)) and t.as_subclass(__import__('torch').Tensor).permute(0,3,2,
                1).flatten().tolist()==list(range(24)) and tuple(read_header(tmp_path/f'x{sfx}')['shape'])==tuple(
                t.shape[1:])

# ---- promises

CLAIMS = """
import gzip, json, os, resource, struct, sys, time, zlib
from pathlib import Path
import numpy as np, nibabel as nib
from fastmed.core import FastmedError, FileError, ResourceError
from fastmed.io.volumes import load_volume, load_mask
import SimpleITK, pydicom
d = Path(sys.argv[1])
BIG = (30000,30000,3000)
def st(k): return int(next(o for o in open('/proc/self/status') if o.startswith(k)).split()[1])*1024
a = np.arange(60, dtype='<i2').reshape(3,4,5)
files = {}
def put(n, b, size=None):
    (d/n).write_bytes(b)
    # full of holes: the file is as long as the header says, and takes no room
    if size:
        os.truncate(d/n, size)
    files[n] = d/n
n1 = bytearray(nib.Nifti1Image(a, np.eye(4)).to_bytes())
struct.pack_into('<8h', n1, 40, 3, *BIG, 1, 1, 1, 1)
n2 = bytearray(nib.Nifti2Image(a, np.eye(4)).to_bytes())
struct.pack_into('<8q', n2, 16, 3, 2**40, 2**40, 2**40, 1, 1, 1, 1)
n3 = bytearray(nib.Nifti2Image(a, np.eye(4)).to_bytes())
struct.pack_into('<8q', n3, 16, 3, 2**62, 4, 2**62, 1, 1, 1, 1)
put('claim.nii', n1)
put('claim2.nii', n2)
put('wraps.nii', n3)
put('claim.nii.gz', gzip.compress(n1))
put('claim2.nii.gz', gzip.compress(n2))
put('claim.hdr', n1[:348])
(d/'claim.img').write_bytes(a.tobytes())
# 120 MB promised, 118 MB there, packed 1000 times
n4 = bytearray(n1)
struct.pack_into('<8h', n4, 40, 3, 1000, 1000, 60, 1, 1, 1, 1)
put('bomb.nii.gz', gzip.compress(bytes(n4)+bytes(118_000_000), 9))
n5 = bytearray(n1)
struct.pack_into('<8h', n5, 40, 3, 10000, 10000, 400, 1, 1, 1, 1)
put('holes.nii', n5, 352+80_000_000_000)
mha = (b'ObjectType = Image\\nNDims = 3\\nBinaryData = True\\nCompressedData = %s\\nElementSpacing = 1 1 1\\nDimSize = '
       b'30000 30000 3000\\nElementType = MET_SHORT\\nElementDataFile = LOCAL\\n')
put('claim.mha', mha%b'False'+bytes(100))
put('packed.mha', mha%b'True'+zlib.compress(bytes(10**6)))
put('holes.mha', (mha%b'False').replace(b'30000 30000 3000', b'10000 10000 400'), 80_000_001_000)
nrrd = b'NRRD0004\\ntype: short\\ndimension: 3\\nsizes: 30000 30000 3000\\nendian: little\\nencoding: %s\\n\\n'
put('claim.nrrd', nrrd%b'raw'+bytes(100))
put('packed.nrrd', nrrd%b'gzip'+gzip.compress(bytes(10**6)))
put('holes.nrrd', (nrrd%b'raw').replace(b'30000 30000 3000', b'10000 10000 400'), 80_000_001_000)
put('ascii.nrrd', nrrd%b'ascii'+b'1 2 3 ')
def chunk(t, b): return len(b).to_bytes(4, 'big')+t+b+zlib.crc32(t+b).to_bytes(4, 'big')
def png(w, h, bits, raw):
    return b'\\x89PNG\\r\\n\\x1a\\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, 0, 0, 0, 0))+chunk(b'IDAT',
            zlib.compress(raw, 9))+chunk(b'IEND', b'')
put('claim.png', png(2**31-1, 2**31-1, 8, bytes(100)))
put('bomb.png', png(100000, 100000, 16, bytes(10**7)))
def tif(w, h, comp, n): 
    e = [(256,4,1,w),(257,4,1,h),(258,3,1,8),(259,3,1,comp),(262,3,1,1),(273,4,1,8),(277,3,1,1),(278,4,1,h),(279,4,1,n)]
    return b'II*\\0'+struct.pack('<I', 8+n)+bytes(n)+struct.pack('<H', len(e))+b''.join(struct.pack('<HHII', *o)
            for o in e)+bytes(4)
put('claim.tif', tif(2**31-1, 2**31-1, 1, 100))
put('packed.tif', tif(2**31-1, 2**31-1, 8, 100))
from pydicom.dataset import Dataset, FileMetaDataset
def dcm(n, **kw):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3.4'
    ds.Modality,ds.StudyInstanceUID,ds.SeriesInstanceUID,ds.InstanceNumber = 'CT','1.2.3','1.2.3.9',1
    ds.ImagePositionPatient,ds.ImageOrientationPatient,ds.PixelSpacing,ds.SliceThickness = [0,0,0],[1,0,0,0,1,0],[1,1],2
    ds.SamplesPerPixel,ds.PhotometricInterpretation,ds.Rows,ds.Columns = 1,'MONOCHROME2',4,5
    ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 16,16,15,1
    ds.PixelData = bytes(40)
    for k,v in kw.items(): setattr(ds, k, v)
    pydicom.dcmwrite(d/n, ds, enforce_file_format=True)
    files[n] = d/n
dcm('claim.dcm', Rows=65535, Columns=65535)
dcm('frames.dcm', NumberOfFrames=2**31-1)
dcm('both.dcm', Rows=65535, Columns=65535, NumberOfFrames=30, SpacingBetweenSlices=2)
dcm('many.dcm', NumberOfFrames=300, SpacingBetweenSlices=2)
(d/'series').mkdir()
dcm('series/1.dcm', Rows=60000, Columns=60000)
dcm('series/2.dcm', Rows=60000, Columns=60000, SOPInstanceUID='1.2.3.5', ImagePositionPatient=[0,0,2], InstanceNumber=2)
del files['series/1.dcm'], files['series/2.dcm']
files['series'] = d/'series'
base,vm = st('VmRSS:'),st('VmSize:')
resource.setrlimit(resource.RLIMIT_AS, (vm+2*2**30,)*2)
res = {}
for n,p in files.items():
    for f in (load_volume, load_mask):
        open('/proc/self/clear_refs', 'w').write('5')
        base = st('VmRSS:')
        try:
            f(p)
            kind,msg = 'read',''
        except (FileError,ResourceError) as e: kind,msg = type(e).__name__,str(e)
        except Exception as e: kind,msg = 'other',f'{type(e).__name__}: {e}'
        res[f'{n} {f.__name__}'] = [kind, msg, st('VmHWM:')-base]
print(json.dumps(res))
"""
def test_headers_that_promise_too_much(tmp_path):
    """Refused by name, in every format, before anything of that size is allocated: at most 100 MB more, under a limit
    of 2 GB"""
    res = json.loads(python(CLAIMS, tmp_path).splitlines()[-1])
    assert len(res)>=40
    for k,(kind,msg,grown) in res.items():
        name = k.split()[0]
        assert kind in ('FileError','ResourceError') and Path(name).name in msg and len(msg)<700, (k, kind, msg)
        assert grown<100e6, f'{k}: {grown/1e6:.0f} MB'
    for n in ('holes.nii','holes.mha','holes.nrrd'):
        assert res[f'{n} load_volume'][0]=='ResourceError', res[f'{n} load_volume']

def test_a_grid_that_no_memory_holds(tmp_path):
    "A scan of 8 mm brought to a thousandth of a millimetre"
    import torch

    from fastmed.core import ResourceError, TensorVolume
    from fastmed.data.preprocess import Preprocess
    with pytest.raises(ResourceError, match='huge.nii.*need'):
        Preprocess(spacing=.001)(TensorVolume(torch.zeros(1,64,64,64), affine=np.diag([8,8,8,1.]),
                meta=dict(fn='huge.nii')))
    with pytest.raises(ResourceError):
        Preprocess(spacing=1e-6)(TensorVolume(torch.zeros(1,64,64,64), affine=np.diag([8,8,8,1.])))

def test_memory_left_knows_the_limit_of_the_process(tmp_path):
    out = python("""
import resource
from fastmed.io.guard import memory_left
vm = int(next(o for o in open('/proc/self/status') if o.startswith('VmSize')).split()[1])*1024
resource.setrlimit(resource.RLIMIT_AS, (vm+2**28+2**20,)*2)
print(memory_left())
""", tmp_path)
    # what the interpreter gave back meanwhile is left again
    assert 0<int(out.split()[-1])<=2**28+2**24
