"""What the doctor finds, what it misses, and where it cries wolf.

python benchmarks/doctor.py [--what faults real leaks shift memory]

faults   each kind of fault, planted one at a time into copies of real scans and of the embedded cohort: doctor_faults.csv, in short doctor_kinds.csv
real     the real sets as they are, every finding judged: doctor_real.csv
leaks    precision and recall of find_leaks on the hippocampus without its subjects; on halves of the subjects; with the ladders of grey values hidden: doctor_leaks.csv
shift    distribution_shift where the answer is known: doctor_shift.csv
memory   peak memory over 10 and over 1,000 scans: doctor_memory.csv

Needs FASTMED_DATA. Minutes are those of one thread of a two-core machine.
"""
import argparse, contextlib, gzip, io, os, shutil, sys, tempfile, time, warnings
from pathlib import Path
import nibabel as nib, numpy as np, pandas as pd
from common import child, here, keep
import fastmed.all as fm
import fastprogress; fastprogress.fastprogress.NO_BAR = True

data = Path(os.environ.get('FASTMED_DATA', ''))

# ---- the scans that are whole

def hippocampus_with_strays(path):
    "The hippocampus and what a real download of it also held, in one folder: DataFrame"
    for d in ('imagesTr','labelsTr'):
        (path/d).mkdir(parents=True)
        for f in [*(data/'hippocampus'/d).glob('*.nii.gz'), *(data/'hippocampus_stray'/d).glob('*.nii.gz')]: (path/d/f.name).symlink_to(f)
    return fm.scan_folder(path, 'imagesTr/*.nii.gz', 'labelsTr/*.nii.gz')

def spine():
    p = data/'spine'
    return pd.DataFrame([dict(case=c, image=p/f'{c}.nii.gz', mask=p/m) for c,m in (('t1','t1_cord.nii.gz'),('t2','t2_cord.nii.gz'),('t2s','t2s_greymatter.nii.gz'),('mt1','mt1_cord.nii.gz'))])

def radiographs(n=None):
    "Frontal chest radiographs as 2D files, with the table's columns"
    t = pd.read_csv(data/'chest_xray/labels.csv').iloc[:n]
    return t.assign(case=[Path(o).stem for o in t.image], image=[data/'chest_xray/images'/o for o in t.image], subject=t.patient_id.astype(str))

def adrenal(path, n=60):
    "Binary shapes of 64³ as scans without a mask: DataFrame"
    z = np.load(data/'adrenal/adrenal_64.npz'); k = next(k for k in z.files if z[k].ndim==4); rows = []
    path.mkdir(parents=True, exist_ok=True)
    for i,a in enumerate(z[k][:n]): nib.save(nib.Nifti1Image(a.astype(np.uint8), np.eye(4)), path/f'{i:03d}.nii.gz'); rows.append(dict(case=f'{i:03d}', image=path/f'{i:03d}.nii.gz'))
    return pd.DataFrame(rows)

def whole_sets(tmp):
    "name → (DataFrame, arguments of check_dataset)"
    ct = pd.DataFrame([dict(case=o.name, image=o) for o in sorted((data/'ct_dicom').iterdir())])
    return {'hippocampus':(fm.scan_decathlon(data/'hippocampus'), {}), 'hippocampus + strays':(hippocampus_with_strays(tmp/'strays'), dict(codes=['background','Anterior','Posterior'])),
            'ixi_brains':(fm.scan_folder(data/'ixi_brains'), {}), 'ms_lesions':(fm.scan_folder(data/'ms_lesions'), {}), 'spine':(spine(), {}), 'ct_dicom':(ct, {}),
            'chest_xray (2D)':(radiographs(), {}), 'adrenal (60 shapes)':(adrenal(tmp/'adrenal'), {}), 'embedded cohort (12)':(fm.cohort(tmp/'cohort', n=12, spacing=4.), dict(image_col=['image','image_t2']))}

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
        a = np.clip(f(np.array(Image.open(fn)).T[...,None].astype(np.float32)), 0, 255); Image.fromarray(a[...,0].T.astype(np.uint8)).save(to.with_name(to.name.replace('.nii.gz', '.png'))); return to.with_name(to.name.replace('.nii.gz', '.png'))
    im = nib.load(fn); a = f(np.asarray(im.dataobj).copy()); new = nib.Nifti1Image(a if dtype is None else a.astype(dtype), aff(im.affine.copy()), dtype=a.dtype if a.dtype in (np.int64,) else None)
    if header: header(new)
    nib.save(new, to); return to

def image(f=lambda a: a, **kw): return lambda r,p: swap(r, 0, rewrite(first(r), p/'x.nii.gz', f, **kw))
def mask(f=lambda a: a, **kw): return lambda r,p: r.update(mask=rewrite(r['mask'], p/'m.nii.gz', f, **kw))
def channel(f=lambda a: a, **kw): return lambda r,p: swap(r, 1, rewrite(r['image'][1], p/'c.nii.gz', f, **kw))
def both(f=lambda a: a, **kw):
    def _f(r, p):
        if isinstance(r['image'], list): r['image'] = [rewrite(o, p/f'x{i}.nii.gz', f, **kw) for i,o in enumerate(r['image'])]
        else: image(f, **kw)(r, p)
        if r.get('mask') is not None: mask(f, **kw)(r, p)
    return _f
def put(a, where, v): a = a.astype(np.float32) if a.dtype.kind=='u' and not np.isfinite(v) else a; a[where] = v; return a
def scale(*v): return lambda A: A@np.diag([*v,1.])
def move(*mm): return lambda A: A+np.array([[0,0,0,o] for o in (*mm,0)])
def turn(A): c,s = np.cos(.1),np.sin(.1); return np.array([[c,-s,0,0],[s,c,0,0],[0,0,1,0],[0,0,0,1]])@A
def shear(A): B = A.copy(); B[:3,1] += .2*A[:3,0]; return B
def reoriented(fn, to, code='LPI'): 
    im = nib.load(fn); code = code if nib.aff2axcodes(im.affine)!=tuple(code) else 'SLA'
    nib.save(im.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(im.affine), nib.orientations.axcodes2ornt(code))), to); return to
def raw(f, name='x.nii.gz'): return lambda r,p: ((p/name).write_bytes(f(Path(first(r)).read_bytes())), swap(r, 0, p/name))
def plain(b): return gzip.decompress(b) if b[:2]==b'\x1f\x8b' else b
def header_bytes(at, v): return lambda b: gzip.compress((h:=plain(b))[:at]+v+h[at+len(v):])
def other_qform(x): x.set_sform(x.affine, 1); x.set_qform(x.affine@np.diag([-1,1,1,1.]), 1)
def foreground(a): return np.argwhere(a>0)
def cut_to_edge(r, p):
    "Crop image and mask so that the structure ends at the edge"
    m = np.asarray(nib.load(r['mask']).dataobj); ax = int(np.argmax(m.shape)); lo = foreground(m).min(0)[ax]+max(1, np.ptp(foreground(m), 0)[ax]//4)
    both(lambda a: a[tuple(slice(lo, None) if i==ax else slice(None) for i in range(3))], aff=lambda A: A+np.c_[np.zeros((4,3)), A[:,ax]*lo])(r, p)
def far_piece(a):
    "A small cube of the first structure, as far from it as the scan allows"
    f = foreground(a); k = a[tuple(f[len(f)//2])]; c = np.array([[2 if i==0 else n-5 for i,n in zip(o, a.shape)] for o in np.ndindex(2,2,2)]); c = np.clip(c, 1, np.array(a.shape)-3)
    best = c[np.argmax([np.abs(f-o).sum(1).min() for o in c])]; return put(a, tuple(slice(o, o+3) for o in best), k)
def other_scan(r, p):
    "The first channel becomes another scan, resampled to its shape"
    from scipy.ndimage import zoom
    b = np.asarray(nib.load(data/'spine/t2.nii.gz').dataobj, dtype=np.float32); swap(r, 0, rewrite(first(r), p/'x.nii.gz', lambda a: zoom(b, np.array(a.shape)/np.array(b.shape), order=1)))
def grow(a):
    from scipy.ndimage import binary_dilation
    v,c = np.unique(a[a>0], return_counts=True); k = v[np.argsort(c)[len(c)//2]]; n = (a==k).sum(); m = a==k
    while m.sum()<4*n: m = binary_dilation(m, iterations=1)
    return np.where(m, k, a).astype(a.dtype)
def main_label(a): return int(np.bincount(a[a>0].ravel().astype(int)).argmax())

# fault: (kind, as what it counts as found, what it needs of the base: m masks, c channels, 5 cases to compare with, 3 dimensions, g NIfTI, what is done (row, folder, rows))
FAULTS = {
    'truncated .nii.gz':            ('unreadable or truncated', {'unreadable'}, 'g', raw(lambda b: b[:len(b)//2])),
    'truncated .nii':               ('unreadable or truncated', {'unreadable'}, 'g', raw(lambda b: plain(b)[:len(plain(b))*3//4], 'x.nii')),
    'last 8 bytes gone':            ('unreadable or truncated', {'unreadable'}, 'g', raw(lambda b: b[:-8])),
    'truncated .png':               ('unreadable or truncated', {'unreadable'}, 'p', raw(lambda b: b[:len(b)//2], 'x.png')),
    'empty file':                   ('unreadable or truncated', {'unreadable'}, '', raw(lambda b: b'')),
    'a web page':                   ('unreadable or truncated', {'unreadable'}, '', raw(lambda b: b'<html>404 not found</html>'*50)),
    'no such file':                 ('unreadable or truncated', {'missing file'}, '', lambda r,p: swap(r, 0, p/'gone.nii.gz')),
    'image without mask':           ('image without mask', {'no mask'}, 'm', lambda r,p: r.update(mask=None)),
    'mask without image':           ('mask without image', {'no image'}, 'm', lambda r,p: r.update(image=None)),
    'mask of another shape':        ('image and mask unlike', {'mask shape'}, 'm', mask(lambda a: a[:-2])),
    'mask of another spacing':      ('image and mask unlike', {'mask spacing'}, 'm', mask(aff=scale(1,1,1.1))),
    'mask of another orientation':  ('image and mask unlike', {'mask orientation'}, 'm', mask(aff=scale(-1,1,1))),
    'mask of another direction':    ('image and mask unlike', {'mask direction'}, 'm', mask(aff=turn)),
    'mask 2 mm aside':              ('image and mask unlike', {'mask place'}, 'm', mask(aff=move(2,0,0))),
    'mask in another order of axes':('image and mask unlike', {'mask turned'}, 'm', lambda r,p: r.update(mask=reoriented(r['mask'], p/'m.nii.gz'))),
    'channel of another shape':     ('channels unlike', {'channel shape'}, 'c', channel(lambda a: a[:-2])),
    'channel of another spacing':   ('channels unlike', {'channel spacing'}, 'c', channel(aff=scale(1,1,1.1))),
    'channel of another orientation':('channels unlike', {'channel orientation'}, 'c', channel(aff=scale(-1,1,1))),
    'channel of another direction': ('channels unlike', {'channel direction'}, 'c', channel(aff=turn)),
    'channel 2 mm aside':           ('channels unlike', {'channel place'}, 'c', channel(aff=move(2,0,0))),
    'channel in another order of axes':('channels unlike', {'channel turned'}, 'c', lambda r,p: swap(r, 1, reoriented(r['image'][1], p/'c.nii.gz'))),
    'affine of zeros':              ('singular affine', {'singular affine'}, 'g', raw(header_bytes(280, bytes(48)))),
    'skewed affine':                ('skewed affine', {'skewed affine'}, 'g', both(aff=shear)),
    'sform against qform':          ('sform against qform', {'sform against qform'}, 'g', image(header=other_qform)),
    'label 77, codes declared':     ('unexpected label', {'unexpected label'}, 'md', mask(lambda a: put(a, tuple(slice(o, o+3) for o in foreground(a)[0]), 77))),
    'label 77, nothing declared':   ('unexpected label', {'rare label','labels not consecutive'}, 'm', mask(lambda a: put(a, tuple(slice(o, o+3) for o in foreground(a)[0]), 77))),
    'a structure gone':             ('missing label', {'missing label','empty mask'}, 'm', mask(lambda a: np.where(a==main_label(a), 0, a).astype(a.dtype))),
    'labels halved':                ('non-integer label', {'label not whole'}, 'm', mask(lambda a: a*np.float32(.5), dtype=np.float32)),
    'labels interpolated':          ('non-integer label', {'label not whole'}, 'm', mask(lambda a: (a+np.roll(a, 1, 0))/np.float32(2), dtype=np.float32)),
    'labels 0 and 255':             ('labels not consecutive', {'rare label','labels not consecutive','unexpected label'}, 'm', mask(lambda a: np.where(a==main_label(a), 255, a).astype(np.int16))),
    'empty mask':                   ('empty mask', {'empty mask'}, 'm', mask(lambda a: a*0)),
    'structure cut by the border':  ('mask touching the border', {'touches border'}, 'mb', cut_to_edge),
    'one NaN':                      ('NaN or Inf', {'NaN or Inf'}, 'g', image(lambda a: put(a.astype(np.float32), (3,4,5), np.nan), dtype=np.float32)),
    'one Inf':                      ('NaN or Inf', {'NaN or Inf'}, 'g', image(lambda a: put(a.astype(np.float32), (3,4,5), np.inf), dtype=np.float32)),
    'all NaN':                      ('NaN or Inf', {'NaN or Inf'}, 'g', image(lambda a: a*np.float32(np.nan), dtype=np.float32)),
    'constant':                     ('constant', {'constant'}, '', image(lambda a: a*0+3)),
    'all but one voxel constant':   ('nearly constant', {'nearly constant'}, '', image(lambda a: put(a*0, (3,4,0), 1))),
    'a trace of noise on 1000':     ('nearly constant', {'nearly constant'}, 'g', image(lambda a: (1000+np.random.default_rng(0).normal(0, .05, a.shape)).astype(np.float32), dtype=np.float32)),
    'thousand times brighter':      ('intensity regime', {'intensity regime'}, 'g', image(lambda a: a.astype(np.float32)*1000, dtype=np.float32)),
    'a million times darker':       ('intensity regime', {'intensity regime'}, 'g', image(lambda a: a.astype(np.float32)/1e6, dtype=np.float32)),
    'eight times the size':         ('odd size', {'odd size'}, '5', both(lambda a: np.concatenate([a]*2, 0).repeat(1, 1) if a.shape[2]==1 else np.pad(a, [(0, n) for n in a.shape]))),
    'half of the scan':             ('odd size', {'odd size'}, '5', both(lambda a: a[:, :a.shape[1]//2])),
    'slices three times as thick':  ('odd spacing', {'odd spacing'}, '5g', both(aff=scale(1,1,3))),
    'half the voxel size':          ('odd spacing', {'odd spacing'}, '5g', both(aff=scale(.5,.5,.5))),
    'offset of a range':            ('odd intensity', {'odd intensity','intensity regime'}, '5g', image(lambda a: a.astype(np.float32)+np.float32(np.ptp(a)), dtype=np.float32)),
    'five times brighter':          ('odd intensity', {'odd intensity','intensity regime'}, '5g', image(lambda a: a.astype(np.float32)*5, dtype=np.float32)),
    'a structure four times as large':('odd volume', {'odd volume'}, '5m', mask(grow)),
    'a structure a fifth as large': ('odd volume', {'odd volume'}, '5m', lambda r,p: mask(lambda a: np.where((a==(k:=main_label(a))) & (np.cumsum((a==k).ravel()).reshape(a.shape)>(a==k).sum()/5), 0, a).astype(a.dtype))(r, p)),
    'same image':                   ('same image twice', {'same image'}, '2', lambda r,p,rs: swap(r, 0, first(rs[0]))),
    'same image, another file':     ('same image twice', {'same image'}, '2g', lambda r,p,rs: swap(r, 0, rewrite(first(rs[0]), p/'x.nii', dtype=np.float64))),
    'same image, other axes':       ('same image twice', {'same image'}, '2g', lambda r,p,rs: swap(r, 0, reoriented(first(rs[0]), p/'x.nii.gz'))),
    'same image, mirrored':         ('same image twice', {'same image'}, '2', lambda r,p,rs: swap(r, 0, rewrite(first(rs[0]), p/'x.nii.gz', lambda a: a[::-1].copy()))),
    'same mask':                    ('same mask twice', {'same mask'}, '2m', lambda r,p,rs: r.update(mask=rs[0]['mask'])),
    'same mask, another type':      ('same mask twice', {'same mask'}, '2m', lambda r,p,rs: r.update(mask=rewrite(rs[0]['mask'], p/'m.nii', dtype=np.float32))),
    'a stray piece':                ('stray components', {'stray pieces'}, 'ms', mask(far_piece)),
    'contrast inverted':            ('wrong modality', {'odd contrast','odd intensity'}, '5', image(lambda a: a.max()-a)),
    'another organ':                ('wrong modality', {'odd contrast','odd intensity','odd size','odd spacing','intensity regime'}, '5g', other_scan),
    'blurred':                      ('odd texture', {'odd texture','odd contrast'}, '5g', image(lambda a: __import__('scipy.ndimage').ndimage.gaussian_filter(a.astype(np.float32), 2.), dtype=np.float32)),
    'noise':                        ('wrong modality', {'odd contrast','odd texture'}, '5g', image(lambda a: np.random.default_rng(0).normal(float(np.mean(a)), float(np.std(a)), a.shape).astype(np.float32), dtype=np.float32)),
    'the mask as image':            ('wrong modality', {'looks like a mask','odd contrast'}, '5m', lambda r,p: swap(r, 0, r['mask'])),
    'channels in another order':    ('wrong modality', {'odd contrast','channel order'}, 'c', lambda r,p: r.update(image=[r['image'][-1], *r['image'][1:-1], r['image'][0]])),
    'other order of axes':          ('mixed orientation', {'mixed orientation'}, '3g', lambda r,p: (r.update(image=[reoriented(o, p/f'x{i}.nii.gz') for i,o in enumerate(r['image'])] if isinstance(r['image'], list) else reoriented(r['image'], p/'x.nii.gz')),
                                                                        r.update(mask=reoriented(r['mask'], p/'m.nii.gz')) if r.get('mask') is not None else None)),
    'a channel more':               ('number of channels', {'number of channels'}, '2', lambda r,p: r.update(image=[*(r['image'] if isinstance(r['image'], list) else [r['image']]), rewrite(first(r), p/'x.nii.gz', lambda a: a//2)])),
    'a channel less':               ('number of channels', {'number of channels'}, '2c', lambda r,p: r.update(image=r['image'][:-1])),
    'too large for memory':         ('too large for memory', {'too large'}, 'g', raw(header_bytes(42, np.array([20000]*3, '<i2').tobytes()))),
    'rounding of 1e-5':             ('(no fault) rounding', set(), 'm', mask(aff=lambda A: A+np.vstack([1e-5*np.random.default_rng(0).uniform(-1, 1, (3,4)), np.zeros(4)]))),
    'saved again as another type':  ('(no fault) rounding', set(), 'g', image(dtype=np.float64))}

DICOM = { # the same for a folder of slices: what is done (files in the order of their position, folder)
    'a slice missing':      ('missing slice', {'missing slice'}, lambda fs,p: fs[len(fs)//2].unlink()),
    'three slices missing': ('missing slice', {'missing slice'}, lambda fs,p: [f.unlink() for f in fs[2:5]]),
    'gantry tilted by 15°': ('gantry tilt', {'gantry tilt'}, lambda fs,p: [edit(f, lambda d,k=k: setattr(d, 'ImagePositionPatient', [d.ImagePositionPatient[0], float(d.ImagePositionPatient[1])+1.34*k, d.ImagePositionPatient[2]])) for k,f in enumerate(fs)]),
    'slices of two sizes':  ('no volume', {'no volume'}, lambda fs,p: edit(fs[3], lambda d: (setattr(d, 'PixelData', d.pixel_array[::2,::2].tobytes()), setattr(d, 'Rows', (d.Rows+1)//2), setattr(d, 'Columns', (d.Columns+1)//2)))),
    'a slice twice':        ('no volume', {'no volume'}, lambda fs,p: shutil.copy(fs[4], p/'again.dcm')),
    'a slice truncated':    ('unreadable or truncated', {'unreadable'}, lambda fs,p: fs[5].write_bytes(fs[5].read_bytes()[:-2000])),
    'an empty folder':      ('unreadable or truncated', {'unreadable','no volume'}, lambda fs,p: [f.unlink() for f in fs]),
    'a page of a report':   ('no volume', {'no volume'}, lambda fs,p: shutil.copy(next(o for o in sorted((data/'ct_dicom/philips_exam_summary_mixed_size').iterdir()) if o.is_file()), p/'page.dcm'))}

def edit(fn, f):
    import pydicom
    d = pydicom.dcmread(fn); f(d); d.save_as(fn)

# ---- planting

def bases(tmp):
    "name → (rows of sound cases, the one that gets the faults, arguments, properties): the hippocampus once for each regime of intensity"
    hip = fm.scan_decathlon(data/'hippocampus'); top = np.array([float(fm.load_volume(f).max()) for f in hip.image]); kind = np.array([0 if t>1e4 else 1 if str(fm.read_header(f)['dtype'])=='uint8' else 2 for t,f in zip(top, hip.image)])
    few = np.sort(np.r_[np.flatnonzero(kind==0)[:4], np.flatnonzero(kind==1)[:6], np.flatnonzero(kind==2)[:14]]); hip,top = hip.iloc[few].reset_index(drop=True),top[few]; kw = dict(codes=['background','anterior','posterior'])
    whole = np.array([str(fm.read_header(f)['dtype'])=='uint8' for f in hip.image]); pick = lambda m: int(np.flatnonzero(m)[len(np.flatnonzero(m))//2])
    res = {'hippocampus, uint8':(hip, pick(whole), kw, 'm53dg2bs'), 'hippocampus, float':(hip, pick(~whole & (top<1e4)), kw, 'm53dg2bs'), 'hippocampus, bright float':(hip, pick(top>1e5), kw, 'm53dg2bs')}
    def cut(df, name, where):                       # the middle of the brain, to save time
        rows = df.to_dict('records')
        for r in rows:
            fs = [*(r['image'] if isinstance(r['image'], list) else [r['image']]), r['mask']]; to = [tmp/name/f.parent.name/f.name for f in fs]
            for f,t in zip(fs, to): t.parent.mkdir(parents=True, exist_ok=True); nib.save(nib.load(f).slicer[where], t)
            r.update(image=to[:-1] if len(to)>2 else to[0], mask=to[-1])
        return pd.DataFrame(rows)
    res['ixi_brains'] = (cut(fm.scan_folder(data/'ixi_brains').iloc[:6], 'ixi', np.s_[30:90,30:90,20:70]), 3, {}, 'm53g2')
    res['ms_lesions, four channels'] = (cut(fm.scan_folder(data/'ms_lesions'), 'ms', np.s_[50:130,60:150,60:130]), 1, dict(codes=['background','lesion']), 'mcdg2')
    res['spine'] = (spine(), 1, dict(codes=['background','cord']), 'mdg2')
    co = fm.cohort(tmp/'faults_cohort', n=8, spacing=4.).assign(image=lambda d: [[a, b] for a,b in zip(d.image, d.image_t2)]); res['embedded cohort, two channels'] = (co, 5, {}, 'm5c3g2')
    res['chest_xray, PNG'] = (radiographs(40), 7, {}, '52p')
    return res

def fresh(old, new):
    "Findings that were not there without the fault"
    was = set(zip(old.case, old.problem, old.found)); return pd.DataFrame(new)[[k not in was for k in zip(new.case, new.problem, new.found)]]

def faults(a):
    tmp,out,start = Path(tempfile.mkdtemp()),[],time.time()
    for name,(df,bad,kw,has) in bases(tmp).items():
        rows = df.to_dict('records'); plain_kw = {k:v for k,v in kw.items() if k!='codes'}; case = str(rows[bad]['case']); before = {}
        for fault,(kind,want,needs,f) in FAULTS.items():
            if a.only and a.only not in fault: continue
            if not set(needs)<=set(has) and not (needs=='p' and 'p' in has): continue
            use = plain_kw if 'nothing declared' in fault or '255' in fault else kw; key = 'codes' in use
            with contextlib.redirect_stdout(io.StringIO()):
                if key not in before: before[key] = fm.check_dataset(df, workers=1, **use)
                p = Path(tempfile.mkdtemp(dir=tmp)); rs = [dict(r, image=list(r['image']) if isinstance(r['image'], list) else r['image']) for r in rows]
                f(rs[bad], p, rs) if f.__code__.co_argcount==3 else f(rs[bad], p)
                r = fresh(before[key], fm.check_dataset(pd.DataFrame(rs).astype(object), workers=1, **use)); shutil.rmtree(p)
            hit = r[r.problem.isin(want) & ((r.case==case) | (r.case=='(all)'))]; others = r[(r.case!=case) & (r.case!='(all)')]
            also = sorted(set(r.problem[r.case==case])-set(hit.problem))
            out.append(dict(kind=kind, fault=fault, base=name, found=bool(len(hit)) if want else not len(r), found_as=', '.join(dict.fromkeys(hit.problem)), severity=', '.join(sorted(set(hit.severity))), named=bool((hit.case==case).any()), also=', '.join(also), other_cases_blamed=len(others), example=next(iter(hit.found), '').replace(str(tmp), '')[:110]))
        print(f'{time.time()-start:.0f} s, {name}: missed', [o['fault'] for o in out if o['base']==name and not o['found']], 'blamed', [(o['fault'], o['other_cases_blamed']) for o in out if o['base']==name and o['other_cases_blamed']], flush=True)
    import pydicom
    src = data/'ct_dicom/philips_phantom_no_tilt_5mm'; fs = sorted((f for f in src.rglob('*') if f.is_file()), key=lambda f: float(pydicom.dcmread(f, stop_before_pixels=True).ImagePositionPatient[2]))
    for part,cut in (('slices 1 to 28',slice(None)), ('slices 1 to 12',slice(0,12)), ('slices 17 to 28',slice(16,28))):
        for fault,(kind,want,f) in {'':('(no fault)', set(), lambda *_: None), **DICOM}.items():
            if a.only and a.only not in fault: continue
            p = Path(tempfile.mkdtemp(dir=tmp)); mine = [Path(shutil.copy(o, p/f'{k:03d}.dcm')) for k,o in enumerate(fs[cut])]; f(mine, p)
            with contextlib.redirect_stdout(io.StringIO()): r = pd.DataFrame(fm.check_dataset(pd.DataFrame([dict(case='ct', image=p)]), workers=1))
            hit = r[r.problem.isin(want)]; out.append(dict(kind=kind, fault=fault or 'as it is', base=f'ct_dicom, {part}', found=bool(len(hit)) if want else not len(r), found_as=', '.join(dict.fromkeys(hit.problem)), severity=', '.join(sorted(set(hit.severity))), named=bool(len(hit)), also=', '.join(sorted(set(r.problem)-want)), other_cases_blamed=0, example=next(iter(hit.found), '').replace(str(tmp), '')[:110]))
    shutil.rmtree(tmp); t = pd.DataFrame(out); t.loc[t.kind.str.startswith('(no'), 'kind'] = '(no fault)'
    if not a.only: t.to_csv(here/'doctor_faults.csv', index=False)
    k = t.groupby('kind', sort=False).agg(planted=('found','size'), found=('found','sum'), bases=('base','nunique'), found_as=('found_as', lambda s: '; '.join(f'{n} × {v}' for v,n in s.value_counts().items() if v)), severity=('severity', lambda s: ', '.join(sorted({o for v in s for o in v.split(', ') if o}))), other_cases_blamed=('other_cases_blamed','sum')).reset_index()
    k.insert(3, 'missed', k.planted-k.found)
    if not a.only: k.to_csv(here/'doctor_kinds.csv', index=False)
    print(k.to_string(index=False)); print('\nmissed:'); print(t[~t.found].to_string(index=False)); print('\nothers blamed:'); print(t[t.other_cases_blamed>0].to_string(index=False))
    print(f'{len(t)} planted, {int((~t.found).sum())} missed, {int(t.other_cases_blamed.sum())} findings about other cases; {time.time()-start:.0f} s')

if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--what', nargs='*', default=['faults','real','leaks','shift','memory'], help='tables to make'); ap.add_argument('--only', default='', help='faults whose name holds this; nothing is kept')
    a = ap.parse_args(); warnings.simplefilter('ignore'); pd.set_option('display.width', 250, 'display.max_colwidth', 90)
    for w in a.what: print(f'---- {w}', flush=True); dict(faults=faults)[w](a)
