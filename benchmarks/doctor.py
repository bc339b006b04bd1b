"""What the doctor finds, what it misses, and where it cries wolf.

python benchmarks/doctor.py [--what faults real leaks shift memory places]

faults   each kind of fault, planted one at a time into copies of real scans and of the embedded cohort:
         doctor_faults.csv, in short doctor_kinds.csv
real     the real sets as they are, every finding judged: doctor_real.csv
leaks    precision and recall of find_leaks on the hippocampus without its subjects; on halves of the subjects;
         with the ladders of grey values hidden: doctor_leaks.csv
shift    distribution_shift where the answer is known: doctor_shift.csv
memory   peak memory over 10 and over 1,000 scans: doctor_memory.csv
places   masks of the hippocampus mirrored or moved under their headers, one at a time and many together; false
         alarms on sets that are whole and on draws from them: doctor_places.csv

Needs FASTMED_DATA. Minutes are those of one thread of a two-core machine.
"""
import argparse
import contextlib
import gzip
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import fastprogress
import nibabel as nib
import numpy as np
import pandas as pd
from common import child, here, keep

import fastmed.all as fm

fastprogress.fastprogress.NO_BAR = True

data = Path(os.environ.get('FASTMED_DATA', ''))

# ---- the scans that are whole

def hippocampus_with_strays(path):
    "The hippocampus and what a real download of it also held, in one folder: DataFrame"
    for d in ('imagesTr','labelsTr'):
        (path/d).mkdir(parents=True)
        for f in [*(data/'hippocampus'/d).glob('*.nii.gz'), *(data/'hippocampus_stray'/d).glob('*.nii.gz')]:
            (path/d/f.name).symlink_to(f)
    return fm.scan_folder(path, 'imagesTr/*.nii.gz', 'labelsTr/*.nii.gz')

def spine():
    p = data/'spine'
    return pd.DataFrame([dict(case=c, image=p/f'{c}.nii.gz', mask=p/m) for c,
            m in (('t1','t1_cord.nii.gz'),('t2','t2_cord.nii.gz'),('t2s','t2s_greymatter.nii.gz'),
            ('mt1','mt1_cord.nii.gz'))])

def radiographs(n=None):
    "Frontal chest radiographs as 2D files, with the table's columns"
    t = pd.read_csv(data/'chest_xray/labels.csv').iloc[:n]
    return t.assign(case=[Path(o).stem for o in t.image], image=[data/'chest_xray/images'/o for o in t.image],
            subject=t.patient_id.astype(str))

def adrenal(path, n=60):
    "Binary shapes of 64³ as scans without a mask: DataFrame"
    z = np.load(data/'adrenal/adrenal_64.npz')
    k = next(k for k in z.files if z[k].ndim==4)
    rows = []
    path.mkdir(parents=True, exist_ok=True)
    for i,a in enumerate(z[k][:n]):
        nib.save(nib.Nifti1Image(a.astype(np.uint8), np.eye(4)), path/f'{i:03d}.nii.gz')
        rows.append(dict(case=f'{i:03d}', image=path/f'{i:03d}.nii.gz'))
    return pd.DataFrame(rows)

def whole_sets(tmp):
    "name → (DataFrame, arguments of check_dataset)"
    ct = pd.DataFrame([dict(case=o.name, image=o) for o in sorted((data/'ct_dicom').iterdir())])
    return {'hippocampus':(fm.scan_decathlon(data/'hippocampus'), {}),
            'hippocampus + strays':(hippocampus_with_strays(tmp/'strays'),
            dict(codes=['background','Anterior','Posterior'])),
            'ixi_brains':(fm.scan_folder(data/'ixi_brains'), {}), 'ms_lesions':(fm.scan_folder(data/'ms_lesions'), {}),
            'spine':(spine(), {}), 'ct_dicom':(ct, {}),
            'chest_xray (2D)':(radiographs(), {}), 'adrenal (60 shapes)':(adrenal(tmp/'adrenal'), {}),
            'embedded cohort (12)':(fm.cohort(tmp/'cohort', n=12, spacing=4.), dict(image_col=['image','image_t2']))}

# ---- faults: each takes the row of a case and an empty folder, and changes the row

def first(r): return r['image'][0] if isinstance(r['image'], list) else r['image']
def swap(r, k, fn):
    "Put `fn` in the place of channel `k`"
    if isinstance(r['image'], list): r['image'] = [fn if i==k else o for i,o in enumerate(r['image'])]
    else: r['image'] = fn

def rewrite(fn, to, f=lambda a: a, aff=lambda A: A, dtype=None, header=None):
    "Copy a scan with its voxels, affine or header changed"
    if Path(fn).suffix=='.png':
        from PIL import Image
        a = np.clip(f(np.array(Image.open(fn)).T[...,None].astype(np.float32)), 0, 255)
        Image.fromarray(a[...,0].T.astype(np.uint8)).save(to.with_name(to.name.replace('.nii.gz', '.png')))
        return to.with_name(to.name.replace('.nii.gz', '.png'))
    im = nib.load(fn)
    a = f(np.asarray(im.dataobj).copy())
    new = nib.Nifti1Image(a if dtype is None else a.astype(dtype), aff(im.affine.copy()),
                          dtype=a.dtype if a.dtype in (np.int64,) else None)
    if header: header(new)
    nib.save(new, to)
    return to

def image(f=lambda a: a, **kw): return lambda r,p: swap(r, 0, rewrite(first(r), p/'x.nii.gz', f, **kw))
def mask(f=lambda a: a, **kw): return lambda r,p: r.update(mask=rewrite(r['mask'], p/'m.nii.gz', f, **kw))
def channel(f=lambda a: a, **kw): return lambda r,p: swap(r, 1, rewrite(r['image'][1], p/'c.nii.gz', f, **kw))
def both(f=lambda a: a, **kw):
    def _f(r, p):
        if isinstance(r['image'], list):
            r['image'] = [rewrite(o, p/f'x{i}.nii.gz', f, **kw) for i,o in enumerate(r['image'])]
        else: image(f, **kw)(r, p)
        if r.get('mask') is not None: mask(f, **kw)(r, p)
    return _f
def put(a, where, v):
    a = a.astype(np.float32) if a.dtype.kind=='u' and not np.isfinite(v) else a
    a[where] = v
    return a
def scale(*v): return lambda A: A@np.diag([*v,1.])
def move(*mm): return lambda A: A+np.array([[0,0,0,o] for o in (*mm,0)])
def turn(A):
    c,s = np.cos(.1),np.sin(.1)
    return np.array([[c,-s,0,0],[s,c,0,0],[0,0,1,0],[0,0,0,1]])@A
def shear(A):
    B = A.copy()
    B[:3,1] += .2*A[:3,0]
    return B
def reoriented(fn, to, code='LPI'): 
    im = nib.load(fn)
    code = code if nib.aff2axcodes(im.affine)!=tuple(code) else 'SLA'
    nib.save(im.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(im.affine),
                                                              nib.orientations.axcodes2ornt(code))), to)
    return to
def raw(f, name='x.nii.gz'):
    return lambda r,p: ((p/name).write_bytes(f(Path(first(r)).read_bytes())), swap(r, 0, p/name))
def plain(b): return gzip.decompress(b) if b[:2]==b'\x1f\x8b' else b
def header_bytes(at, v): return lambda b: gzip.compress((h:=plain(b))[:at]+v+h[at+len(v):])
def other_qform(x):
    x.set_sform(x.affine, 1)
    x.set_qform(x.affine@np.diag([-1,1,1,1.]), 1)
def foreground(a): return np.argwhere(a>0)
def cut_to_edge(r, p):
    "Crop image and mask so that the structure ends at the edge"
    m = np.asarray(nib.load(r['mask']).dataobj)
    ax = int(np.argmax(m.shape))
    lo = foreground(m).min(0)[ax]+max(1, np.ptp(foreground(m), 0)[ax]//4)
    both(lambda a: a[tuple(slice(lo, None) if i==ax else slice(None) for i in range(3))],
         aff=lambda A: A+np.c_[np.zeros((4,3)), A[:,ax]*lo])(r, p)
def far_piece(a):
    "A small cube of the first structure, as far from it as the scan allows"
    f = foreground(a)
    k = a[tuple(f[len(f)//2])]
    c = np.array([[2 if i==0 else n-5 for i,n in zip(o, a.shape)] for o in np.ndindex(2,2,2)])
    c = np.clip(c, 1, np.array(a.shape)-3)
    best = c[np.argmax([np.abs(f-o).sum(1).min() for o in c])]
    return put(a, tuple(slice(o, o+3) for o in best), k)
def other_scan(r, p):
    "The first channel becomes another scan, resampled to its shape"
    from scipy.ndimage import zoom
    b = np.asarray(nib.load(data/'spine/t2.nii.gz').dataobj, dtype=np.float32)
    swap(r, 0, rewrite(first(r), p/'x.nii.gz', lambda a: zoom(b, np.array(a.shape)/np.array(b.shape), order=1)))
def grow(a):
    from scipy.ndimage import binary_dilation
    v,c = np.unique(a[a>0], return_counts=True)
    k = v[np.argsort(c)[len(c)//2]]
    n = (a==k).sum()
    m = a==k
    while m.sum()<4*n: m = binary_dilation(m, iterations=1)
    return np.where(m, k, a).astype(a.dtype)
def main_label(a): return int(np.bincount(a[a>0].ravel().astype(int)).argmax())

# fault: (kind, as what it counts as found, what it needs of the base: m masks, c channels, 5 cases to compare with, 3
# dimensions, g NIfTI, what is done (row, folder, rows))
FAULTS = {
    'truncated .nii.gz':            ('unreadable or truncated', {'unreadable'}, 'g', raw(lambda b: b[:len(b)//2])),
    'truncated .nii':               ('unreadable or truncated', {'unreadable'}, 'g',
        raw(lambda b: plain(b)[:len(plain(b))*3//4], 'x.nii')),
    'last 8 bytes gone':            ('unreadable or truncated', {'unreadable'}, 'g', raw(lambda b: b[:-8])),
    'truncated .png':               ('unreadable or truncated', {'unreadable'}, 'p',
        raw(lambda b: b[:len(b)//2], 'x.png')),
    'empty file':                   ('unreadable or truncated', {'unreadable'}, '', raw(lambda b: b'')),
    'a web page':                   ('unreadable or truncated', {'unreadable'}, '',
        raw(lambda b: b'<html>404 not found</html>'*50)),
    'no such file':                 ('unreadable or truncated', {'missing file'}, '',
        lambda r,p: swap(r, 0, p/'gone.nii.gz')),
    'image without mask':           ('image without mask', {'no mask'}, 'm', lambda r,p: r.update(mask=None)),
    'mask without image':           ('mask without image', {'no image'}, 'm', lambda r,p: r.update(image=None)),
    'mask of another shape':        ('image and mask unlike', {'mask shape'}, 'm', mask(lambda a: a[:-2])),
    'mask of another spacing':      ('image and mask unlike', {'mask spacing'}, 'm', mask(aff=scale(1,1,1.1))),
    'mask of another orientation':  ('image and mask unlike', {'mask orientation'}, 'm', mask(aff=scale(-1,1,1))),
    'mask of another direction':    ('image and mask unlike', {'mask direction'}, 'm', mask(aff=turn)),
    'mask 2 mm aside':              ('image and mask unlike', {'mask place'}, 'm', mask(aff=move(2,0,0))),
    'mask in another order of axes':('image and mask unlike', {'mask turned'}, 'm',
        lambda r,p: r.update(mask=reoriented(r['mask'], p/'m.nii.gz'))),
    'channel of another shape':     ('channels unlike', {'channel shape'}, 'c', channel(lambda a: a[:-2])),
    'channel of another spacing':   ('channels unlike', {'channel spacing'}, 'c', channel(aff=scale(1,1,1.1))),
    'channel of another orientation':('channels unlike', {'channel orientation'}, 'c', channel(aff=scale(-1,1,1))),
    'channel of another direction': ('channels unlike', {'channel direction'}, 'c', channel(aff=turn)),
    'channel 2 mm aside':           ('channels unlike', {'channel place'}, 'c', channel(aff=move(2,0,0))),
    'channel in another order of axes':('channels unlike', {'channel turned'}, 'c',
        lambda r,p: swap(r, 1, reoriented(r['image'][1], p/'c.nii.gz'))),
    'affine of zeros':              ('singular affine', {'singular affine'}, 'g', raw(header_bytes(280, bytes(48)))),
    'skewed affine':                ('skewed affine', {'skewed affine'}, 'g', both(aff=shear)),
    'sform against qform':          ('sform against qform', {'sform against qform'}, 'g', image(header=other_qform)),
    'label 77, codes declared':     ('unexpected label', {'unexpected label'}, 'md',
                                     mask(lambda a: put(a, tuple(slice(o, o+3) for o in foreground(a)[0]), 77))),
    'label 77, nothing declared':   ('unexpected label', {'rare label','labels not consecutive'}, 'm',
                                     mask(lambda a: put(a, tuple(slice(o, o+3) for o in foreground(a)[0]), 77))),
    'a structure gone':             ('missing label', {'missing label','empty mask'}, 'm',
                                     mask(lambda a: np.where(a==main_label(a), 0, a).astype(a.dtype))),
    'labels halved':                ('non-integer label', {'label not whole'}, 'm',
                                     mask(lambda a: a*np.float32(.5), dtype=np.float32)),
    'labels interpolated':          ('non-integer label', {'label not whole'}, 'm',
                                     mask(lambda a: (a+np.roll(a, 1, 0))/np.float32(2), dtype=np.float32)),
    'labels 0 and 255':             ('labels not consecutive',
                                     {'rare label','labels not consecutive','unexpected label'}, 'm',
                                     mask(lambda a: np.where(a==main_label(a), 255, a).astype(np.int16))),
    'empty mask':                   ('empty mask', {'empty mask'}, 'm', mask(lambda a: a*0)),
    'structure cut by the border':  ('mask touching the border', {'touches border'}, 'mb', cut_to_edge),
    'one NaN':                      ('NaN or Inf', {'NaN or Inf'}, 'g',
                                     image(lambda a: put(a.astype(np.float32), (3,4,5), np.nan), dtype=np.float32)),
    'one Inf':                      ('NaN or Inf', {'NaN or Inf'}, 'g',
                                     image(lambda a: put(a.astype(np.float32), (3,4,5), np.inf), dtype=np.float32)),
    'all NaN':                      ('NaN or Inf', {'NaN or Inf'}, 'g',
                                     image(lambda a: a*np.float32(np.nan), dtype=np.float32)),
    'constant':                     ('constant', {'constant'}, '', image(lambda a: a*0+3)),
    'all but one voxel constant':   ('nearly constant', {'nearly constant'}, '', image(lambda a: put(a*0, (3,4,0), 1))),
    'a trace of noise on 1000':     ('nearly constant', {'nearly constant'}, 'g',
                                     image(lambda a: (1000+np.random.default_rng(0).normal(0, .05,
        a.shape)).astype(np.float32), dtype=np.float32)),
    'thousand times brighter':      ('intensity regime', {'intensity regime'}, 'g',
                                     image(lambda a: a.astype(np.float32)*1000, dtype=np.float32)),
    'a million times darker':       ('intensity regime', {'intensity regime'}, 'g',
                                     image(lambda a: a.astype(np.float32)/1e6, dtype=np.float32)),
    'eight times the size':         ('odd size', {'odd size'}, '5',
                                     both(lambda a: np.concatenate([a]*2, 0).repeat(1, 1) if a.shape[2]==1
                                          else np.pad(a, [(0, n) for n in a.shape]))),
    'half of the scan':             ('odd size', {'odd size'}, '5', both(lambda a: a[:, :a.shape[1]//2])),
    'slices three times as thick':  ('odd spacing', {'odd spacing'}, '5g', both(aff=scale(1,1,3))),
    'half the voxel size':          ('odd spacing', {'odd spacing'}, '5g', both(aff=scale(.5,.5,.5))),
    'offset of a range':            ('odd intensity', {'odd intensity','intensity regime'}, '5g',
                                     image(lambda a: a.astype(np.float32)+np.float32(np.ptp(a)), dtype=np.float32)),
    'five times brighter':          ('odd intensity', {'odd intensity','intensity regime'}, '5g',
                                     image(lambda a: a.astype(np.float32)*5, dtype=np.float32)),
    'a structure four times as large':('odd volume', {'odd volume'}, '5m', mask(grow)),
    'a structure a fifth as large': ('odd volume', {'odd volume'}, '5m',
                                     lambda r,p: mask(lambda a: np.where((a==(k:=main_label(a)))
        & (np.cumsum((a==k).ravel()).reshape(a.shape)>(a==k).sum()/5), 0, a).astype(a.dtype))(r, p)),
    'same image':                   ('same image twice', {'same image'}, '2', lambda r,p,rs: swap(r, 0, first(rs[0]))),
    'same image, another file':     ('same image twice', {'same image'}, '2g',
        lambda r,p,rs: swap(r, 0, rewrite(first(rs[0]), p/'x.nii', dtype=np.float64))),
    'same image, other axes':       ('same image twice', {'same image'}, '2g',
        lambda r,p,rs: swap(r, 0, reoriented(first(rs[0]), p/'x.nii.gz'))),
    'same image, mirrored':         ('same image twice', {'same image'}, '2',
        lambda r,p,rs: swap(r, 0, rewrite(first(rs[0]), p/'x.nii.gz', lambda a: a[::-1].copy()))),
    'same mask':                    ('same mask twice', {'same mask'}, '2m',
        lambda r,p,rs: r.update(mask=rs[0]['mask'])),
    'same mask, another type':      ('same mask twice', {'same mask'}, '2m',
        lambda r,p,rs: r.update(mask=rewrite(rs[0]['mask'], p/'m.nii', dtype=np.float32))),
    'a stray piece':                ('stray components', {'stray pieces'}, 'ms', mask(far_piece)),
    'contrast inverted':            ('wrong modality', {'odd contrast','odd intensity'}, '5',
                                     image(lambda a: a.max()-a)),
    'another organ':                ('wrong modality', {'odd contrast','odd intensity','odd size','odd spacing',
                                     'intensity regime'}, '5g', other_scan),
    'blurred':                      ('odd texture', {'odd texture','odd contrast'}, '5g',
        image(lambda a: __import__('scipy.ndimage').ndimage.gaussian_filter(a.astype(np.float32), 2.),
                                   dtype=np.float32)),
    'noise':                        ('wrong modality', {'odd contrast','odd texture'}, '5g',
                                     image(lambda a: np.random.default_rng(0).normal(float(np.mean(a)),
        float(np.std(a)), a.shape).astype(np.float32), dtype=np.float32)),
    'the mask as image':            ('wrong modality', {'looks like a mask','odd contrast'}, '5m',
        lambda r,p: swap(r, 0, r['mask'])),
    'channels in another order':    ('wrong modality', {'odd contrast','channel order'}, 'c',
        lambda r,p: r.update(image=[r['image'][-1], *r['image'][1:-1], r['image'][0]])),
    'other order of axes':          ('mixed orientation', {'mixed orientation'}, '3g',
        lambda r,p: (r.update(image=[reoriented(o, p/f'x{i}.nii.gz') for i,o in enumerate(r['image'])]
        if isinstance(r['image'], list) else reoriented(r['image'], p/'x.nii.gz')),
                                                                        r.update(mask=reoriented(r['mask'],
        p/'m.nii.gz')) if r.get('mask') is not None else None)),
    'a channel more':               ('number of channels', {'number of channels'}, '2',
        lambda r,p: r.update(image=[*(r['image'] if isinstance(r['image'], list) else [r['image']]),
        rewrite(first(r), p/'x.nii.gz', lambda a: a//2)])),
    'a channel less':               ('number of channels', {'number of channels'}, '2c',
        lambda r,p: r.update(image=r['image'][:-1])),
    'too large for memory':         ('too large for memory', {'too large'}, 'g',
        raw(header_bytes(42, np.array([20000]*3, '<i2').tobytes()))),
    'rounding of 1e-5':             ('(no fault) rounding', set(), 'm',
                                     mask(aff=lambda A: A
                                          +np.vstack([1e-5*np.random.default_rng(0).uniform(-1, 1, (3,4)),
                                                      np.zeros(4)]))),
    'saved again as another type':  ('(no fault) rounding', set(), 'g', image(dtype=np.float64))}

DICOM = { # the same for a folder of slices: what is done (files in the order of their position, folder)
    'a slice missing':      ('missing slice', {'missing slice'}, lambda fs,p: fs[len(fs)//2].unlink()),
    'three slices missing': ('missing slice', {'missing slice'}, lambda fs,p: [f.unlink() for f in fs[2:5]]),
    'gantry tilted by 15°': ('gantry tilt', {'gantry tilt'},
        lambda fs,p: [edit(f, lambda d,k=k: setattr(d, 'ImagePositionPatient',
                                                    [d.ImagePositionPatient[0], float(d.ImagePositionPatient[1])+1.34*k,
                                                     d.ImagePositionPatient[2]])) for k,f in enumerate(fs)]),
    'slices of two sizes':  ('no volume', {'no volume'},
        lambda fs,p: edit(fs[3], lambda d: (setattr(d, 'PixelData', d.pixel_array[::2,::2].tobytes()),
        setattr(d, 'Rows', (d.Rows+1)//2), setattr(d, 'Columns', (d.Columns+1)//2)))),
    'a slice twice':        ('no volume', {'no volume'}, lambda fs,p: shutil.copy(fs[4], p/'again.dcm')),
    'a slice truncated':    ('unreadable or truncated', {'unreadable'},
                                                         lambda fs,p: fs[5].write_bytes(fs[5].read_bytes()[:-2000])),
    'an empty folder':      ('unreadable or truncated', {'unreadable','no volume'},
                                                         lambda fs,p: [f.unlink() for f in fs]),
    'a page of a report':   ('no volume', {'no volume'},
        lambda fs,p: shutil.copy(next(o for o in sorted((data/'ct_dicom/philips_exam_summary_mixed_size').iterdir())
                                 if o.is_file()), p/'page.dcm'))}

def edit(fn, f):
    import pydicom
    d = pydicom.dcmread(fn)
    f(d)
    d.save_as(fn)

# ---- planting

def bases(tmp):
    """name → (rows of sound cases, the one that gets the faults, arguments, properties): the hippocampus once for each
    regime of intensity"""
    hip = fm.scan_decathlon(data/'hippocampus')
    top = np.array([float(fm.load_volume(f).max()) for f in hip.image])
    def regime(t, f):
        if t>1e4: return 0
        return 1 if str(fm.read_header(f)['dtype'])=='uint8' else 2
    kind = np.array([regime(t, f) for t,f in zip(top, hip.image)])
    few = np.sort(np.r_[np.flatnonzero(kind==0)[:4], np.flatnonzero(kind==1)[:6], np.flatnonzero(kind==2)[:14]])
    hip,top = hip.iloc[few].reset_index(drop=True),top[few]
    kw = dict(codes=['background','anterior','posterior'])
    whole = np.array([str(fm.read_header(f)['dtype'])=='uint8' for f in hip.image])
    pick = lambda m: int(np.flatnonzero(m)[len(np.flatnonzero(m))//2])
    res = {'hippocampus, uint8':(hip, pick(whole), kw, 'm53dg2bs'), 'hippocampus, float':(hip, pick(~whole & (top<1e4)),
            kw, 'm53dg2bs'), 'hippocampus, bright float':(hip, pick(top>1e5), kw, 'm53dg2bs')}
    def cut(df, name, where):                       # the middle of the brain, to save time
        rows = df.to_dict('records')
        for r in rows:
            fs = [*(r['image'] if isinstance(r['image'], list) else [r['image']]), r['mask']]
            to = [tmp/name/f.parent.name/f.name for f in fs]
            for f,t in zip(fs, to):
                t.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.load(f).slicer[where], t)
            r.update(image=to[:-1] if len(to)>2 else to[0], mask=to[-1])
        return pd.DataFrame(rows)
    res['ixi_brains'] = (cut(fm.scan_folder(data/'ixi_brains').iloc[:6], 'ixi', np.s_[30:90,30:90,20:70]), 3, {},
                         'm53g2')
    res['ms_lesions, four channels'] = (cut(fm.scan_folder(data/'ms_lesions'), 'ms', np.s_[50:130,60:150,60:130]), 1,
                                        dict(codes=['background','lesion']), 'mcdg2')
    res['spine'] = (spine(), 1, dict(codes=['background','cord']), 'mdg2')
    co = fm.cohort(tmp/'faults_cohort', n=8, spacing=4.).assign(image=lambda d: [[a, b] for a,
                   b in zip(d.image, d.image_t2)])
    res['embedded cohort, two channels'] = (co, 5, {}, 'm5c3g2')
    res['chest_xray, PNG'] = (radiographs(40), 7, {}, '52p')
    return res

def fresh(old, new):
    "Findings that were not there without the fault"
    was = set(zip(old.case, old.problem, old.found))
    return pd.DataFrame(new)[[k not in was for k in zip(new.case, new.problem, new.found)]]

def planted(f, row, p, rows):
    "Plant a fault into `row`, a case of `rows`; its files are written into the folder `p`"
    if f.__code__.co_argcount==3: f(row, p, rows)
    else: f(row, p)

def scored(r, hit, want, **more):
    "What the doctor said of one planted fault, as a row"
    return dict(found=bool(len(hit)) if want else not len(r), found_as=', '.join(dict.fromkeys(hit.problem)),
                severity=', '.join(sorted(set(hit.severity))), example=next(iter(hit.found), ''), **more)

def faults_of(name, base, tmp, only):
    "Each fault of `FAULTS` that the set has a place for, planted alone: rows"
    df,bad,kw,has = base
    rows,case,before = df.to_dict('records'),str(df.case.iloc[bad]),{}
    for fault,(kind,want,needs,f) in FAULTS.items():
        if only and only not in fault or not set(needs)<=set(has) and not (needs=='p' and 'p' in has): continue
        bare = 'nothing declared' in fault or '255' in fault
        use = {k:v for k,v in kw.items() if k!='codes'} if bare else kw
        key = 'codes' in use
        with contextlib.redirect_stdout(io.StringIO()):
            if key not in before: before[key] = fm.check_dataset(df, workers=1, **use)
            p = Path(tempfile.mkdtemp(dir=tmp))
            rs = [dict(r, image=list(r['image']) if isinstance(r['image'], list) else r['image']) for r in rows]
            planted(f, rs[bad], p, rs)
            r = fresh(before[key], fm.check_dataset(pd.DataFrame(rs).astype(object), workers=1, **use))
            shutil.rmtree(p)
        hit = r[r.problem.isin(want) & ((r.case==case) | (r.case=='(all)'))]
        others = r[(r.case!=case) & (r.case!='(all)')]
        also = sorted(set(r.problem[r.case==case])-set(hit.problem))
        blamed = '; '.join(f'{o.case} {o.problem}: {o.found}' for o in others.itertuples())[:160]
        yield dict(kind=kind, fault=fault, base=name, named=bool((hit.case==case).any()),
                   **scored(r, hit, want, also=', '.join(also), other_cases_blamed=len(others), blamed_for=blamed))

def dicom_faults(tmp, only):
    "The faults of `DICOM`, planted into parts of one series: rows"
    import pydicom
    def height(f): return float(pydicom.dcmread(f, stop_before_pixels=True).ImagePositionPatient[2])
    src = data/'ct_dicom/philips_phantom_no_tilt_5mm'
    fs = sorted((f for f in src.rglob('*') if f.is_file()), key=height)
    for part,cut in (('slices 1 to 28',slice(None)), ('slices 1 to 12',slice(0,12)), ('slices 17 to 28',slice(16,28))):
        for fault,(kind,want,f) in {'':('(no fault)', set(), lambda *_: None), **DICOM}.items():
            if only and only not in fault: continue
            p = Path(tempfile.mkdtemp(dir=tmp))
            f([Path(shutil.copy(o, p/f'{k:03d}.dcm')) for k,o in enumerate(fs[cut])], p)
            with contextlib.redirect_stdout(io.StringIO()):
                r = pd.DataFrame(fm.check_dataset(pd.DataFrame([dict(case='ct', image=p)]), workers=1))
            hit = r[r.problem.isin(want)]
            also = ', '.join(sorted(set(r.problem)-want))
            yield dict(kind=kind, fault=fault or 'as it is', base=f'ct_dicom, {part}', named=bool(len(hit)),
                       **scored(r, hit, want, also=also, other_cases_blamed=0))

def by_kind(t):
    "A line a kind of fault"
    def counted(s): return '; '.join(f'{n} × {v}' for v,n in s.value_counts().items() if v)
    def joined(s): return ', '.join(sorted({o for v in s for o in v.split(', ') if o}))
    k = t.groupby('kind', sort=False).agg(
        planted=('found','size'), found=('found','sum'), bases=('base','nunique'), found_as=('found_as',counted),
        severity=('severity',joined), other_cases_blamed=('other_cases_blamed','sum')).reset_index()
    k.insert(3, 'missed', k.planted-k.found)
    return k

COLUMNS = 'kind fault base found found_as severity named also other_cases_blamed blamed_for example'.split()
def faults(a):
    "Faults planted one at a time, and what was found"
    tmp,out = Path(tempfile.mkdtemp()),[]
    for name,base in bases(tmp).items():
        mine = list(faults_of(name, base, tmp, a.only))
        print(f'{time.process_time():.0f} s, {name}: missed', [o['fault'] for o in mine if not o['found']], 'blamed',
              [(o['fault'], o['other_cases_blamed']) for o in mine if o['other_cases_blamed']], flush=True)
        out += mine
    out += dicom_faults(tmp, a.only)
    for o in out: o['example'] = o['example'].replace(str(tmp), '')[:110]
    shutil.rmtree(tmp)
    t = pd.DataFrame(out).reindex(columns=COLUMNS)
    t.loc[t.kind.str.startswith('(no'), 'kind'] = '(no fault)'
    k = by_kind(t)
    if not a.only:
        t.to_csv(here/'doctor_faults.csv', index=False)
        k.to_csv(here/'doctor_kinds.csv', index=False)
    print(k.to_string(index=False))
    print('\nmissed:')
    print(t[~t.found].to_string(index=False))
    print('\nothers blamed:')
    print(t[t.other_cases_blamed>0].to_string(index=False))
    print(f'{len(t)} planted, {int((~t.found).sum())} missed, {int(t.other_cases_blamed.sum())} findings about other '
          f'cases; {time.process_time():.0f} s of one core')

# ---- clean data

TRUE = { # (set, kind of finding, part of the case's name): why a finding on real data is right
    ('hippocampus','intensity regime',
    ''):'true: 8-bit, 12-bit and floating point exports, up to a factor of several thousand apart',
    ('hippocampus','stray pieces','156'):'true: four voxels of the anterior part stand apart',
    ('hippocampus + strays','no image',''):'true: 010 and 281 are masks without an image',
    ('hippocampus + strays','no mask','118'):'true: no label of 118 was there',
    ('hippocampus + strays','intensity regime',''):'true, as above',
    ('hippocampus + strays','stray pieces','156'):'true, as above',
    ('hippocampus + strays','','281'):'true: 281 is a mask of another organ, 512×512×94',
    ('ixi_brains','labels not consecutive',''):'true: 149 numbers up to 208, declare them',
    ('ixi_brains','stray pieces',''):'true: the labels are automatic, single voxels stand apart in all ten',
    ('spine','mixed orientation',''):'true: RAS, PSR and LAS',
    ('spine','touches border',''):'true: the cord runs out of every scan',
    ('ct_dicom','gantry tilt','tilt18'):'true: 18.5°, and distances of 1.08 to 7 mm',
    ('ct_dicom','no volume','mixed'):'true: six images of three sizes',
    ('chest_xray (2D)','odd intensity',''):'true: a veil, the darkest grey is far above black',
    ('chest_xray (2D)','odd contrast',''):'true: wide black borders, or another window',
    ('chest_xray (2D)','odd texture',''):'true: looked at, blurred or sharpened'}

def real(a):
    "The sets as they are"
    tmp,rows = Path(tempfile.mkdtemp()),[]
    for name,(df,kw) in whole_sets(tmp).items():
        t = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()): r = fm.check_dataset(df, workers=1, **kw)
        dt = time.process_time()-t
        base = dict(set=name, cases=len(df), errors=len(r.errors), warnings=len(r.warnings), seconds=round(dt, 1))
        for (sev,prob,case),g in pd.DataFrame(r).groupby(['severity','problem','case'], sort=False):
            why = next((w for (s,k,c),w in TRUE.items() if s==name and k in ('',prob) and c in case), 'NOT JUDGED')
            rows.append(dict(**base, case=case, severity=sev, problem=prob,
                    found=g.found.iloc[0].replace(str(data), '').replace(str(tmp), '')[:140], judged=why))
        if not len(r): rows.append(dict(**base, case='', severity='', problem='nothing found', found='', judged=''))
    shutil.rmtree(tmp)
    t = pd.DataFrame(rows)
    t.to_csv(here/'doctor_real.csv', index=False)
    print(t.drop(columns='seconds').to_string(index=False))
    print(t.drop_duplicates('set')[['set','cases','errors','warnings','seconds']].to_string(index=False))
    print('not judged:', int((t.judged=='NOT JUDGED').sum()))

# ---- leaks

def hide(v): return {**v, 'prints':[{**p, 'quantum':np.nan, 'gaps':None} for p in v['prints']]}

def pair_score(subjects, idx, prints, ask=None, kinds=('proved','likely'), **kw):
    "precision, recall, pairs there of the cases `idx`; `ask`: those of them that pairs are asked of"
    from fastmed.data.leaks import _pairs
    s,ask = subjects[idx],set(range(len(idx)) if ask is None else ask)
    found = dict(zip(('proved','likely'), _pairs(prints, **kw)))
    got = [p for k in kinds for p in found[k] if p[0] in ask and p[1] in ask]
    there = sum(s[i]==s[j] for n,i in enumerate(sorted(ask)) for j in sorted(ask)[n+1:])
    true = sum(s[i]==s[j] for i,j in got)
    return dict(named=len(got), true=true, there=there, precision=true/len(got) if got else np.nan,
                recall=true/there if there else np.nan)

def mean_score(what, rs):
    "A row of the table, over several draws"
    rs = pd.DataFrame(rs)
    return dict(what=what, draws=len(rs), named=rs.named.mean(), true=rs.true.mean(), there=rs.there.mean(),
                precision=rs.true.sum()/max(1, rs.named.sum()), recall=rs.true.sum()/rs.there.sum(),
                worst_precision=rs.precision.min(), worst_recall=rs.recall.min())

def halves_of(score, subjects, prints, draws):
    "Random halves of the subjects: name of a row → scores"
    rng,subs,every = np.random.default_rng(0),np.unique(subjects),np.arange(len(subjects))
    bare,res = [hide(v) for v in prints],{k:[] for k in HALVES}
    def f1(r): return 2*r['true']/max(1, r['named']+r['there'])
    def best_of(values, argument, idx, vs): return max(values, key=lambda c: f1(score(idx, vs, **{argument:c})))
    for _ in range(draws):
        side = np.isin(subjects, rng.permutation(subs)[:len(subs)//2])
        ia,ib = np.flatnonzero(side),np.flatnonzero(~side)
        va,vb,na,nb = [[o[i] for i in k] for o,k in ((prints,ia), (prints,ib), (bare,ia), (bare,ib))]
        whole,taught,sure,ahead = res.values()
        whole += [score(ia, va), score(ib, vb)]
        taught.append(score(every, [bare[i] if side[i] else v for i,v in enumerate(prints)], ask=ia))
        sure.append(score(ib, vb, sure=best_of((.5,.7,.8,.9,.95,.98,.99), 'sure', ia, va)))
        ahead.append(score(ib, nb, ahead=best_of((.8,1.,1.3,1.6,2.,2.5), 'ahead', ia, na)))
    return res

HALVES = ('random halves of the subjects, as it is',
          'a random half of the subjects with ladders and gaps hidden, the other half teaches',
          'least probability chosen on one half of the subjects, used on the other',
          'ladders and gaps hidden, lead chosen on one half, used on the other')
def leaks(a):
    "find_leaks against cases.csv, and as it would do where its thresholds were not chosen"
    from fastmed.data.leaks import _pairs, _scan_print
    from fastmed.data.survey import survey_cases
    df = fm.scan_decathlon(data/'hippocampus')
    s = df.subject.astype(str).values
    t = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        vox = survey_cases(df, '.', 'image', None, .05, None, 1, prints=_scan_print)[1]
    took = time.process_time()-t
    every,score = np.arange(len(df)),partial(pair_score, s)
    whole = np.array([float(v['channels'][0]['level'])<np.log10(300) and float(v['prints'][0]['quantum'])==1
                      for v in vox])
    rows = {'all 208, as it is':[score(every, vox)],
            'all 208, proved alone':[score(every, vox, likely=False)],
            'all 208, likely alone':[score(every, vox, kinds=('likely',))],
            'whole-numbered crops alone, learnt from the ladders of the others':
                [score(every, vox, ask=np.flatnonzero(whole))],
            'all 208, ladders and gaps hidden: nothing teaches':[score(every, [hide(v) for v in vox])],
            **halves_of(score, s, vox, a.draws)}
    t = pd.DataFrame([mean_score(k, v) for k,v in rows.items()]).round(3)
    t.to_csv(here/'doctor_leaks.csv', index=False)
    print(t.to_string(index=False))
    print(f'fingerprints of 208 crops: {took:.1f} s of one core')
    names,(proof,like) = df.case.tolist(),_pairs(vox)
    found = {**proof, **like}
    print('not of one subject:', [(names[i], names[j], w) for (i,j),w in found.items() if s[i]!=s[j]])
    print('missed:', [(names[i], names[j]) for i in every for j in every[i+1:] if s[i]==s[j] and (i,j) not in found])

# ---- shift

def shift(a):
    "distribution_shift where the answer is known"
    from fastmed.data.oddities import _shift, _shift_features
    rows = []
    hip = fm.scan_decathlon(data/'hippocampus')
    top = np.array([float(fm.load_volume(f).max()) for f in hip.image])
    rng = np.random.default_rng(0)
    def put(what, t, truth):
        rows.extend(dict(what=what, truth=truth, family=f, **r.round(3).to_dict()) for f,r in t.iterrows())
        print(what, t.auc['all'].round(3), flush=True)
    with contextlib.redirect_stdout(io.StringIO()):
        X,y,g,lost = _shift_features((hip[top>1e4], hip[top<=1e4]), '.', 'image', 'site', None, 1)
    back = np.argsort(np.r_[np.flatnonzero(top>1e4), np.flatnonzero(top<=1e4)])
    X,g = X.iloc[back].reset_index(drop=True),g[back]
    put('hippocampus: the bright regime against the others', _shift(X, (top<=1e4).astype(int), g, 0, 2000, 0),
        'intensity differs')
    whole = top<300
    put('hippocampus: 8-bit against the others', _shift(X, (~whole).astype(int), g, 0, 2000, 0), 'intensity differs')
    null = []
    for k in range(a.draws):
        y = np.isin(g, rng.permutation(g.max()+1)[:(g.max()+1)//2]).astype(int)
        t = _shift(X, y, g, 0, 1000, k)
        null += [dict(family=f, auc=r.auc, differs=r.low>.5, outside=r.low>.5 or r.high<.5) for f,r in t.iterrows()]
    n = pd.DataFrame(null).groupby('family', sort=False)
    for f,r in n.agg(auc=('auc','mean'), low=('auc','min'), high=('auc','max'), differs=('differs','mean'),
            outside=('outside','mean')).iterrows():
        rows.append(dict(what=f'hippocampus: {a.draws} random halves of the subjects', truth='nothing differs',
                         family=f, auc=round(r.auc, 3), low=round(r.low, 3), high=round(r.high, 3),
                         called_different=r.differs, half_outside_interval=r.outside))
    x = radiographs()
    x = x[np.isin(np.arange(len(x)), rng.permutation(len(x))[:a.films])]
    with contextlib.redirect_stdout(io.StringIO()):
        t = fm.distribution_shift(x[x['view']=='AP'], x[x['view']=='PA'], workers=1)
    put(f'chest_xray: AP against PA, {a.films} films', t, 'another way of taking the film')
    with contextlib.redirect_stdout(io.StringIO()):
        t = fm.distribution_shift(fm.scan_folder(data/'ixi_brains'), hip.iloc[:30], workers=1)
    put('ixi_brains against hippocampus', t, 'everything differs')
    t = pd.DataFrame(rows)
    t.to_csv(here/'doctor_shift.csv', index=False)
    print(t.to_string(index=False))

# ---- masks that do not lie on their image

def moved(lab, ax, n):
    "A mask moved by `n` voxels along an axis, nothing coming in from the other side; 0: mirrored"
    if n==0: return np.ascontiguousarray(np.flip(lab, ax))
    new = np.roll(lab, n, ax)
    np.moveaxis(new, ax, 0)[slice(0, n) if n>0 else slice(n, None)] = 0
    return new

def seen_by_the_doctor(df, fit, image_col='image'):
    "`fit` of image and mask of each case, as `check_dataset` takes it"
    from fastmed.data.survey import survey_cases
    with contextlib.redirect_stdout(io.StringIO()):
        return [v.get('fit', {}) for v in survey_cases(df, '.', image_col, 'mask', .05, None, 1, fit=fit)[1]]

def places(a):
    "Masks that are mirrored or moved: found, and sound cases blamed"
    from fastmed.data.oddities import border_profiles, misplaced_masks
    def found(cases): return {o[0] for o in misplaced_masks(cases)}
    def put(what, others, who, hits, blamed):
        rows.append(dict(what=what, cases=others, planted=len(who), found=hits, blamed=blamed))
    def draws(name, cases, sizes):
        for n in sizes:
            blamed = [len(found([cases[i] for i in rng.permutation(len(cases))[:n]])) for _ in range(a.sets)]
            put(f'{name}: {a.sets} draws, nothing planted', n, [], 0, sum(blamed))
    tmp,rows,rng = Path(tempfile.mkdtemp()),[],np.random.default_rng(0)
    pairs = seen_by_the_doctor(fm.scan_decathlon(data/'hippocampus'), lambda x, lab: (x, lab))
    sound = [border_profiles(*o) for o in pairs]
    sets = {'hippocampus':sound, 'ixi_brains':seen_by_the_doctor(fm.scan_folder(data/'ixi_brains'), border_profiles),
            'embedded cohort':seen_by_the_doctor(fm.cohort(tmp/'cohort', n=24, spacing=2.), border_profiles)}
    for name,cases in sets.items(): put(f'{name}: all, nothing planted', len(cases), [], 0, len(found(cases)))
    draws('hippocampus', sound, (8,10,12,16,20,30,40))
    draws('embedded cohort', sets['embedded cohort'], (8,12,16))
    who = rng.permutation(len(sound))[:20].tolist()
    faults = {f"{'mirrored' if n==0 else f'moved by {n:+d} voxels'} along {'xyz'[ax]}":(ax, n) for ax in range(3)
              for n in (0,3,-3,5,-5)}
    new = {}
    for what,f in faults.items():
        new[what] = {i:border_profiles(pairs[i][0], moved(pairs[i][1], *f)) for i in who}
        one = [found([new[what][i] if j==i else c for j,c in enumerate(sound)]) for i in who]
        put(f'{what}, one at a time', len(sound), who, sum(i in o for i,o in zip(who, one)),
            sum(len(o-{i}) for i,o in zip(who, one)))
        few = [found([new[what][i], *(sound[j] for j in rng.permutation(list(set(range(len(sound)))-{i}))[:19])])
               for i in who]
        put(f'{what}, one at a time', 20, who, sum(0 in o for o in few), sum(len(o-{0}) for o in few))
        every = found([new[what].get(j, c) for j,c in enumerate(sound)])
        put(f'{what}, 20 together', len(sound), who, len(every&set(who)), len(every-set(who)))
    names = list(faults)
    hits = blamed = 0
    for _ in range(a.sets):
        mixed = found([new[names[rng.integers(len(names))]][j] if j in new[names[0]] else c for j,
                       c in enumerate(sound)])
        hits,blamed = hits+len(mixed&set(who)),blamed+len(mixed-set(who))
    put(f'each of 20 mirrored or moved in its own way, together, {a.sets} draws', len(sound), who*a.sets, hits, blamed)
    shutil.rmtree(tmp)
    t = pd.DataFrame(rows)
    t.to_csv(here/'doctor_places.csv', index=False)
    print(t.to_string(index=False))

# ---- memory

def one_memory(a):
    "Peak memory of one run, in a process of its own"
    import json

    from common import peak, reset_peak, rss
    df = pd.DataFrame([dict(case=f'{k}', image=f'{a.path}/{k:04d}.nii') for k in range(a.n)])
    f = fm.find_leaks if a.which=='find_leaks' else fm.check_dataset
    with contextlib.redirect_stdout(io.StringIO()): f(df[:2], workers=a.workers)
    reset_peak()
    held = rss()
    t = time.time()
    with contextlib.redirect_stdout(io.StringIO()): r = f(df, workers=a.workers)
    print(json.dumps(dict(peak_mb=round(peak()/2**20, 1), held_before_mb=round(held/2**20, 1),
                          kept_mb=round(rss()/2**20, 1), seconds=round(time.time()-t, 1), rows=len(r))))

def memory(a):
    "Ten and a thousand scans of 1 MB, each with a content of its own; threads, so one process holds everything"
    tmp,rng,rows = Path(tempfile.mkdtemp()),np.random.default_rng(0),[]
    base = rng.normal(500, 100, (64,64,64)).astype(np.float32)
    for k in range(a.many):
        x = np.roll(base, k*7, 0)*np.float32(rng.uniform(.8, 1.2))
        x[:8] += rng.normal(0, 20, (8,64,64)).astype(np.float32)
        nib.save(nib.Nifti1Image(x, np.eye(4)), tmp/f'{k:04d}.nii')
    for which in ('check_dataset','find_leaks'):
        for w in (0,2):
            ns = {n:child(__file__, '--one', '--path', tmp, '--n', n, '--workers', w, '--which', which)
                          for n in (10,a.many)}
            rows += [dict(which=which, workers=w, scans=n, **o, peak_over_ten=round(o['peak_mb']/ns[10]['peak_mb'], 3))
                    for n,o in ns.items()]
    shutil.rmtree(tmp)
    keep(rows, here/'doctor_memory.csv', ['which','workers','scans'])

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--what', nargs='*', default=['faults','real','leaks','shift'],
                    choices=['faults','real','leaks','shift','memory','places'], help='tables to make')
    ap.add_argument('--only', default='', help='faults whose name holds this; nothing is kept')
    ap.add_argument('--draws', type=int, default=20, help='random halves')
    ap.add_argument('--films', type=int, default=300, help='radiographs')
    ap.add_argument('--many', type=int, default=1000, help='scans of the memory test')
    ap.add_argument('--sets', type=int, default=200, help='random sets of sound cases')
    for k in ('--path','--which'): ap.add_argument(k, help=argparse.SUPPRESS)
    for k in ('--n','--workers'): ap.add_argument(k, type=int, help=argparse.SUPPRESS)
    ap.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    a = ap.parse_args()
    warnings.simplefilter('ignore')
    pd.set_option('display.width', 250, 'display.max_colwidth', 90)
    if a.one:
        one_memory(a)
        sys.exit()
    for w in a.what:
        print(f'---- {w}', flush=True)
        dict(faults=faults, real=real, leaks=leaks, shift=shift, memory=memory, places=places)[w](a)
