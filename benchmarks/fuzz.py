"""Every reader against files that are broken on purpose: `python benchmarks/fuzz.py` (about 20,000 files), `--quick`
for a few hundred.

Real scans (where FASTMED_DATA names them) and files written here are mutated: bits flipped, cut, spliced, fields of the
header set to values that have broken readers before, headers given anew with a right checksum, packed
payloads unpacked, changed and packed again. Each is read in a child process with a limit of memory and of time. What
may come out is a right result or a `FastmedError`; anything else is written down with the number that makes
the same file again: `python benchmarks/fuzz.py --reader nrrd --only 1234 --keep DIR`."""
import argparse
import collections
import contextlib
import csv
import gzip
import io
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# of the draw; a read may take so long; and so many bytes beyond what the libraries take
SEED,SECONDS,ROOM = 20240,10,3*2**30

# ---- values that have broken readers before
INTS = (0,1,2,3,4,7,8,16,127,128,255,256,32767,32768,65535,65536,2**24,2**31-1,2**31,2**32-1,-1,-2,-32768,-2**31,
        2**63-1,2**64-1)
FLOATS = (0.,-0.,1.,-1.,float('nan'),float('inf'),-float('inf'),1e-45,1e-30,1e30,3.4e38,1e308,352.,1e9)
WORDS = ('','0','1','-1','2','3','4','5','99999','2147483648','4294967296','99999999999999999999','1e308','nan','inf',
         '-inf','1e-320','abc','(1,0,0)','none','../../etc/passwd','/dev/zero','LOCAL','LIST','9'*400,'\x00','ü',
         '%s%n%s',' ','"')

def pick(rng, seq): return seq[int(rng.integers(len(seq)))]
def clip(v, size, signed):
    m = 1<<(8*size)
    v %= m
    return v-m if signed and v>=m//2 else v

def bits(rng, b, near=400):
    "A few changes of single bytes, most of them near the front"
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 9))):
        i = int(rng.integers(min(near, len(b)) if rng.random()<.7 else len(b)))
        b[i] = (b[i]^(1<<int(rng.integers(8)))) if rng.random()<.5 else pick(rng,
                (0,1,0x7f,0x80,0xff,32,int(rng.integers(256))))
    return bytes(b)
def number(rng, b, near=400):
    "A number of 2, 4 or 8 bytes put somewhere"
    s = pick(rng, (2,4,4,8))
    i = int(rng.integers(max(1, min(near, len(b))-s)))
    f = pick(rng, ('<','>'))+{2:'H',4:'I',8:'Q'}[s]
    return b[:i]+struct.pack(f, clip(pick(rng, INTS), s, False))+b[i+s:]
def cut(rng, b):
    return b[:int(rng.integers(len(b))) if rng.random()<.6 else len(b)-1-int(rng.integers(min(len(b), 64)))]
def piece(rng, b):
    "A piece is taken out, doubled, moved, blanked or made of noise"
    i = int(rng.integers(len(b)))
    n = int(min(len(b)-i, 2**rng.uniform(0, 10)))
    p = b[i:i+n]
    how = rng.integers(5)
    if how==0: return b[:i]+b[i+n:]
    if how==1: return b[:i]+p*int(rng.integers(2, 6))+b[i+n:]
    if how==2:
        j = int(rng.integers(len(b)))
        r = b[:i]+b[i+n:]
        return r[:j]+p+r[j:]
    return b[:i]+(bytes(n) if how==3 else rng.bytes(n))+b[i+n:]
def splice(rng, b, other):
    i,j = int(rng.integers(len(b)+1)),int(rng.integers(len(other)+1))
    return b[:i]+other[j:]
def blind(rng, b, other, near=400):
    if not b: return rng.bytes(10)
    return pick(rng, (bits,bits,number,number,cut,piece,lambda r,o: splice(r, o, other),lambda r,o: o+r.bytes(20)))(rng,
            b, *([near] if False else []))

# ---- what knows the formats

FIELDS = (('i',0),('b',39),*(('h',40+2*k) for k in range(8)),('h',68),('h',70),('h',70),('h',72),
        *(('f',76+4*k) for k in range(8)),('f',108),('f',108),('f',112),('f',116),('B',123),('h',252),('h',254),
        *(('f',256+4*k) for k in range(18)),('4s',344),('4s',348))
FIELDS2 = (('i',0),('8s',4),('h',12),('h',12),('h',14),*(('q',16+8*k) for k in range(8)),
        *(('d',104+8*k) for k in range(8)),('q',168),('q',168),('d',176),('d',184),('i',344),('i',348),
        *(('d',352+8*k) for k in range(18)),('i',500))
def nifti(rng, b, other):
    if len(b)<352 or rng.random()<.3: return blind(rng, b, other)
    two = b[:4] in (b'\x1c\2\0\0', b'\0\0\2\x1c')
    big = b[:4] in (b'\0\0\1\x5c', b'\0\0\2\x1c')
    o = '>' if big else '<'
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 4))):
        f,at = pick(rng, FIELDS2 if two and len(b)>540 else FIELDS)
        s = struct.calcsize(f)
        if f in 'fd':
            with np.errstate(over='ignore'): v = np.array(pick(rng, FLOATS)).astype(o+dict(d='d', f='f4')[f]).tobytes()
        elif f.endswith('s'):
            v = pick(rng, (b'n+1\0', b'ni1\0', b'n+2\0', b'\0'*4, b'\1\0\0\0', b'\xff'*4)).ljust(s, b'\0')[:s]
        else:
            v = struct.pack(o+f,
                            clip(pick(rng, INTS) if rng.random()<.6
                                 else pick(rng, (2,4,8,16,32,64,128,256,512,768,1024,1280,1536,1792,2048,2304,20,30,50,
                                                 300)), s, f.islower()))
        b[at:at+s] = v
    return bytes(b)
def packed(f):
    "The same within gzip: the payload is changed and packed again, or the packed bytes are changed"
    def _inner(rng, b, other):
        try: a,o = gzip.decompress(b),gzip.decompress(other)
        except (OSError, EOFError, zlib.error): return blind(rng, b, other)
        return blind(rng, b, other, 40) if rng.random()<.3 else gzip.compress(f(rng, a, o), 1)
    return _inner

def lines(end, words=()):
    "A header of text lines up to `end`, before binary voxels"
    def _inner(rng, b, other):
        k = b.find(end)
        if k<0 or rng.random()<.25: return blind(rng, b, other)
        ls,rest = b[:k].decode('latin-1').split('\n'),b[k:]
        for _ in range(int(rng.integers(1, 4))): ls = text_lines(rng, ls, words)
        if rng.random()<.1: rest = blind(rng, rest, other)
        return '\n'.join(ls).encode('latin-1', 'replace')+rest
    return _inner
def text_lines(rng, ls, words=()):
    i = int(rng.integers(len(ls))) if ls else 0
    how = rng.integers(8)
    if not ls: return ['x']
    if how==0: return ls[:i]+ls[i+1:]
    if how==1: return ls[:i+1]+[ls[i]]*int(rng.integers(1, 4))+ls[i+1:]
    if how==2:
        j = int(rng.integers(len(ls)))
        ls = list(ls)
        ls[i],ls[j] = ls[j],ls[i]
        return ls
    if how==3 and words: return ls[:i]+[pick(rng, words).replace('$', pick(rng, WORDS))]+ls[i:]
    if how==4:
        s = ls[i]
        j = int(rng.integers(len(s)+1))
        return ls[:i]+[s[:j]+pick(rng, WORDS)+s[j:]]+ls[i+1:]
    import re
    toks = re.split(r'([\s:=,()]+)', ls[i])
    j = int(rng.integers(len(toks)))
    toks[j] = pick(rng, WORDS) if rng.random()<.7 else pick(rng, [str(o) for o in INTS])
    return ls[:i]+[''.join(toks)]+ls[i+1:]
NRRD = tuple('''\
dimension: $|sizes: 4 4 $|type: double|type: block|type: uint64|type: int8|block size: $|encoding: raw
encoding: gzip|encoding: ascii|encoding: hex|encoding: bz2|endian: big|space: left-posterior-superior-time
space directions: none (1,0,0) (0,1,0) (0,0,1)|space directions: (1,0,$) (0,1,0) (0,0,1)|space origin: ($,0,0)
kinds: vector domain domain domain|kinds: domain domain $|line skip: $|byte skip: $|data file: $
data file: x%03d.raw 1 $ 1|data file: LIST|data file: SKIPLIST|space dimension: $|spacings: 1 1 $
thicknesses: nan nan nan|measurement frame: (1,0,0) (0,1,0) (0,0,1)|old min: $|content: $
key:=$|# $'''.replace('\n','|').split('|'))
META = tuple('''\
NDims = $|DimSize = 4 4 $|DimSize = 4 $|ElementType = MET_DOUBLE|ElementType = MET_UCHAR
ElementType = MET_STRING|ElementType = MET_LONG_LONG|ElementType = MET_$|ElementNumberOfChannels = $
CompressedData = True|CompressedData = False|CompressedDataSize = $|BinaryData = False
BinaryDataByteOrderMSB = True|HeaderSize = $|ElementSpacing = 1 1 $|ElementSize = $ 1 1|Offset = $ 0 0
TransformMatrix = 1 0 0 0 1 0 0 0 $|TransformMatrix = $|Position = $|AnatomicalOrientation = $
ObjectType = Scene|ObjectType = Mesh|ElementMin = $|ElementDataFile = $|ElementDataFile = LIST
ElementDataFile = x%03d.raw 1 $ 1|Modality = $|Comment = $|$ = 1'''.replace('\n','|').split('|'))

def chunks(rng, b, other):
    "PNG: chunks changed, dropped, doubled or made up, their sums right"
    if b[:4]!=b'\x89PNG' or rng.random()<.25: return blind(rng, b, other, 60)
    cs,i = [],8
    while i+8<=len(b):
        n = int.from_bytes(b[i:i+4], 'big')
        cs.append((b[i+4:i+8], b[i+8:i+8+n]))
        i += 12+n
    for _ in range(int(rng.integers(1, 3))):
        k = int(rng.integers(len(cs))) if rng.random()<.5 else 0
        how = rng.integers(6)
        t,d = cs[k]
        if how<2 and t==b'IHDR':
            d = bytearray(d)
            at,s = pick(rng, ((0,4),(4,4),(8,1),(9,1),(10,1),(11,1),(12,1)))
            d[at:at+s] = clip(pick(rng, INTS), s, False).to_bytes(s, 'big')
            cs[k] = (t, bytes(d))
        elif how==2: cs = cs[:k]+cs[k+1:] or cs
        elif how==3: cs.insert(k, cs[int(rng.integers(len(cs)))])
        elif how==4:
            cs.insert(int(rng.integers(1, len(cs)+1)),
                    (pick(rng, (b'PLTE',b'tRNS',b'gAMA',b'iCCP',b'zTXt',b'iTXt',b'pHYs',b'sPLT',b'eXIf',b'IDAT',b'IEND',
                                b'ABCD')), rng.bytes(int(rng.integers(40)))))
        elif t==b'IDAT':
            try: raw = zlib.decompress(b''.join(v for c,v in cs if c==b'IDAT'))
            except zlib.error: raw = b'\0'*100
            at = next(j for j,(c,_) in enumerate(cs) if c==b'IDAT')
            cs = [c for c in cs if c[0]!=b'IDAT']
            cs.insert(at, (b'IDAT', zlib.compress(blind(rng, raw, raw))))
        else: cs[k] = (t, blind(rng, d, d))
    return b[:8]+b''.join(len(d).to_bytes(4, 'big')+t+d+zlib.crc32(t+d).to_bytes(4, 'big') for t,d in cs)
def tiff(rng, b, other):
    "TIFF: entries of the directory"
    if len(b)<16 or rng.random()<.3: return blind(rng, b, other)
    o = '<' if b[:2]==b'II' else '>'
    at, = struct.unpack(o+'I', b[4:8])
    if at+2>len(b): return blind(rng, b, other)
    n, = struct.unpack(o+'H', b[at:at+2])
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 4))):
        i = at+2+12*int(rng.integers(max(1, n)))
        part = rng.integers(4)
        if i+12>len(b): break
        if part==0:
            struct.pack_into(o+'H', b, i,
                             pick(rng, (254,256,257,258,259,262,273,277,278,279,284,317,320,322,323,324,325,338,339,530,
                                        347)))
        elif part==1: struct.pack_into(o+'H', b, i+2, int(rng.integers(20)))
        else:
            struct.pack_into(o+'I', b, i+(4 if part==2 else 8),
                             clip(pick(rng, INTS) if rng.random()<.7 else pick(rng, (5,6,7,8,32773,32946,34661,50000)),
                                  4, False))
    return bytes(b)
TAGS = ((0x28,0x10),(0x28,0x11),(0x28,0x100),(0x28,0x101),(0x28,0x102),(0x28,0x103),(0x28,2),(0x28,4),(0x28,6),(0x28,8),
        (0x28,0x30),(0x28,0x1052),(0x28,0x1053),(0x20,0x32),(0x20,0x37),(0x18,0x50),(0x18,0x88),(0x20,0xd),(0x20,0xe),
        (0x20,0x13),(2,0x10),(2,0),(8,0x16),(8,0x18),(8,0x60),(0x7fe0,0x10))
UIDS = ('1.2.840.10008.1.2','1.2.840.10008.1.2.1','1.2.840.10008.1.2.2','1.2.840.10008.1.2.5','1.2.840.10008.1.2.4.50',
        '1.2.840.10008.1.2.4.90','1.2.840.10008.1.2.1.99')
NUMBERS = ('1\\1','0\\0','1\\0\\0\\0\\1\\0','nan\\nan\\nan','1e300')
KINDS = (b'OB',b'OW',b'SQ',b'UN',b'DS',b'US',b'UI',b'LO',b'AT',b'FD',b'\0\0')
def element(rng, b, at):
    "Change the element of a DICOM file that begins at byte `at`"
    vr = bytes(b[at+4:at+6])
    long = vr in (b'OB',b'OW',b'SQ',b'UN',b'UT')
    kind,size,head = ('<I',4,8) if long else ('<H',2,6)
    n,v = struct.unpack_from(kind, b, at+head)[0],at+head+size
    how = rng.integers(5)
    if how==0: struct.pack_into(kind, b, at+head, clip(pick(rng, INTS), size, False))
    elif how==1: b[at+4:at+6] = pick(rng, KINDS)
    elif how==2: del b[at:min(len(b), v+n)]
    elif vr in (b'US',b'SS'): struct.pack_into('<H', b, v, clip(pick(rng, INTS), 2, False))
    elif n<200:
        new = pick(rng, WORDS+UIDS+NUMBERS).encode('utf-8')[:1000]
        new += b' '*(len(new)%2)
        b[v:v+n] = new
        struct.pack_into(kind, b, at+head, len(new)%65536)
    else:
        i = v+int(rng.integers(max(1, min(n, len(b)-v))))
        b[i:i+4] = rng.bytes(4)

def dicom(rng, b, other):
    "DICOM: length, kind and value of elements that matter"
    if rng.random()<.3: return blind(rng, b, other, 3000)
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 3))):
        g,e = pick(rng, TAGS)
        at = b.find(struct.pack('<HH', g, e), 128)
        if at<0 or at+12>len(b): continue
        element(rng, b, at)
    return bytes(b)
def text(rng, b, other):
    if rng.random()<.2: return blind(rng, b, other, len(b))
    s = b.decode('utf-8', 'replace')
    how = rng.integers(6)
    if how==0:
        i = int(rng.integers(len(s)+1))
        return (s[:i]+pick(rng, ('['*3000,'{"a":'*3000,'(','"',"'",'\x00','\ufeff','\r','\r\n\r\n','\t','#','=',',',
                ',,,,','1e999','NaN','null','true','-0','"\\ud800"','a'*70000))+s[i:]).encode('utf-8', 'surrogatepass')
    if how==1: return s.encode(pick(rng, ('utf-16','utf-32','latin-1','utf-8-sig')), 'replace')
    ls = s.split('\n')
    for _ in range(int(rng.integers(1, 4))):
        ls = text_lines(rng, ls, ('data = $','folds = $','seed = $','budget = {minutes = $}','[arms.x]','[arms.$]',
                                  'ndim = $','spacing = $','case,image,$','$,$,$'))
    return '\n'.join(ls).encode('utf-8', 'surrogateescape')
def values(rng, o, odd=(None,True,-1,0,2,1e308,2**70,'',"x",[],{},[[]],{'tuple':[1]},{'dict':{}},{'tuple':1},
                        {'a':1,'b':2},'../x',[1e9]*3,['a'],'ü',-5.5,10**9,'UNet','SegResNet','keep_largest')):
    "JSON with a value somewhere replaced, dropped or added"
    if isinstance(o, dict) and o and rng.random()<.9:
        k = pick(rng, sorted(o))
        how = rng.random()
        if how<.06: return {a:b for a,b in o.items() if a!=k}
        if how<.1:
            return {**o, pick(rng, ('x','tuple','dict','arch','nf','depth','pretrained','__class__')):pick(rng, odd)}
        return {a:(values(rng, b, odd) if a==k else b) for a,b in o.items()}
    if isinstance(o, list) and o and rng.random()<.8:
        k = int(rng.integers(len(o)))
        how = rng.random()
        if how<.1: return o[:k]+o[k+1:]
        if how<.2: return o[:k]+[o[k]]*int(rng.integers(2, 5))+o[k+1:]
        return o[:k]+[values(rng, o[k], odd)]+o[k+1:]
    return pick(rng, odd)
def sealed(rng, b, other):
    "A model file: bytes changed, or its header and metadata changed and sealed again"
    from fastmed.learn import modelformat
    if rng.random()<.3: return blind(rng, b, other)
    n = int.from_bytes(b[:8], 'little')
    head = json.loads(b[8:8+n])
    meta = json.loads(head['__metadata__']['fastmed'])
    how = rng.random()
    if how<.7:
        for _ in range(int(rng.integers(1, 4))):
            m = values(rng, {k:v for k,v in meta.items() if k not in ('sha256',)})
            meta = {**(m if isinstance(m, dict) else {'x':m}), 'sha256':modelformat.NO_DIGEST}
        head['__metadata__']['fastmed'] = json.dumps({'sha256':modelformat.NO_DIGEST, **meta})
    else:
        m = values(rng, {k:v for k,v in head.items() if k!='__metadata__'})
        head = {'__metadata__':head['__metadata__'], **(m if isinstance(m, dict) else {'x':m})}
        head['__metadata__']['fastmed'] = json.dumps({**meta, 'sha256':modelformat.NO_DIGEST})
    h = json.dumps(head).encode()
    h += b' '*(-len(h)%8)
    body = b[8+n:] if rng.random()<.8 else blind(rng, b[8+n:], other)
    return modelformat.with_sha256(len(h).to_bytes(8, 'little')+h+body)
def resealed(rng, b, other):
    "An ONNX file: bytes changed, and sealed again most of the time; or its metadata changed"
    from fastmed.learn import modelformat
    i = b.rfind(b'"sha256": "sha256:')+11
    z = b[:i]+modelformat.NO_DIGEST.encode()+b[i+len(modelformat.NO_DIGEST):]
    if rng.random()<.4:
        j = z.rfind(b'{"sha256": "sha256:')
        end = json.JSONDecoder().raw_decode(z[j:].decode('latin-1'))[1]
        meta = json.loads(z[j:j+end])
        got = values(rng, meta)
        if not isinstance(got, dict): got = {'x':got}
        t = json.dumps({'sha256':modelformat.NO_DIGEST, **{k:v for k,v in got.items() if k!='sha256'}}).encode()
        if len(t)<=end: z = z[:j]+t.ljust(end)+z[j+end:]
        return modelformat.with_sha256(z)
    z = blind(rng, z, other, len(z))
    return modelformat.with_sha256(z) if modelformat.NO_DIGEST.encode() in z and rng.random()<.9 else z
NAMES = ('a.txt','a/b.txt','A.TXT','a','a/','./a','../x','/tmp/fuzz_x','C:\\x','C:x','..\\x','a\\..\\..\\x','a/../../x',
         '\\\\host\\x','~/x','a:b','a\x00b','a\nb','a'*300,'x/'*200+'y','con','nul.txt','.','..','','/','a//b','ü',
         'u\u0308',' ','a.','.checksum','a/.checksum','\u202ex','-x','*','"')
def tars(rng, b, other):
    "A tar: made of odd members, or its blocks changed with the right sum"
    if rng.random()<.5:
        f = io.BytesIO()
        with tarfile.open(fileobj=f, mode='w',
                          format=pick(rng, (tarfile.USTAR_FORMAT,tarfile.GNU_FORMAT,tarfile.PAX_FORMAT))) as t:
            for _ in range(int(rng.integers(1, 6))):
                i = tarfile.TarInfo(pick(rng, NAMES) if rng.random()<.5 else f'd/{rng.integers(9)}.txt')
                i.type = pick(rng, (b'0',)*6+(b'1',b'2',b'3',b'4',b'5',b'6',b'7',b'S',b'L',b'K',b'x',b'g'))
                i.linkname = pick(rng, NAMES)
                d = rng.bytes(int(rng.integers(2000)))
                i.size = len(d)
                try: t.addfile(i, io.BytesIO(d))
                except Exception: pass
        b = f.getvalue()
        if rng.random()<.5: return pack(rng, b)
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 4))):
        at = 512*int(rng.integers(max(1, len(b)//512)))
        f,n = pick(rng, ((0,100),(100,8),(124,12),(124,12),(156,1),(157,100),(257,6),(329,8),(345,155)))
        if at+512>len(b): break
        b[at+f:at+f+n] = {124:pick(rng, (b'77777777777\0', b'\x80'+b'\0'*4+b'\x7f'*7, b'-0000000001\0', b'\xff'*12,
                b'00000000000\0', b'zzzzzzzzzzzz', b'00000100000\0')),
                156:pick(rng, (b'0',b'1',b'2',b'3',b'5',b'S',b'L',b'x',b'g',b'\xff'))}.get(f,
                pick(rng, NAMES).encode('utf-8').ljust(n, b'\0')[:n])
        s = bytearray(b[at:at+512])
        s[148:156] = b' '*8
        if rng.random()<.9: b[at+148:at+156] = b'%06o\0 '%sum(s)
    return pack(rng, bytes(b) if rng.random()<.8 else blind(rng, bytes(b), other))
def pack(rng, b):
    import bz2
    import lzma
    return pick(rng, (lambda o: o,lambda o: o,gzip.compress,bz2.compress,lzma.compress))(b)
def zips(rng, b, other):
    if rng.random()<.5:
        f = io.BytesIO()
        with zipfile.ZipFile(f, 'w') as z:
            for _ in range(int(rng.integers(1, 6))):
                i = zipfile.ZipInfo('a')
                i.filename = pick(rng, NAMES) if rng.random()<.5 else f'd/{rng.integers(9)}.txt'
                i.external_attr = pick(rng, (0,0o100644<<16,0o120777<<16,0o040755<<16,0o020666<<16,0o010644<<16,
                                             0xffffffff,16))
                i.compress_type = pick(rng, (0,8,12,14))
                try: z.writestr(i, bytes(int(rng.integers(3000))))
                except Exception: pass
        b = f.getvalue()
    if rng.random()<.3: return blind(rng, b, other, len(b))
    b = bytearray(b)
    for _ in range(int(rng.integers(1, 4))):
        sig = pick(rng, (b'PK\1\2',b'PK\1\2',b'PK\3\4',b'PK\5\6'))
        at = b.find(sig, int(rng.integers(len(b))))
        at = b.find(sig) if at<0 else at
        if at<0: continue
        off,s = pick(rng, {b'PK\1\2':((8,2),(10,2),(16,4),(20,4),(24,4),(24,4),(28,2),(30,2),(38,4),(42,4)),
                           b'PK\3\4':((6,2),(8,2),(14,4),(18,4),(22,4),(26,2),(28,2)),
                           b'PK\5\6':((4,2),(8,2),(10,2),(12,4),(16,4),(20,2))}[sig])
        b[at+off:at+off+s] = clip(pick(rng, INTS), s, False).to_bytes(s, 'little')
    return bytes(b)

# ---- the readers: what is given, who changes it, how it is read, how many

def wrong(msg): raise AssertionError(msg)
def volume(p, f):
    "Read image, mask and header of a scan; they must agree"
    import torch

    from fastmed.all import FastmedError, load_mask, load_volume, read_header
    heard = []
    try: h = read_header(p)
    except FastmedError as e:
        h = None
        heard.append(e)
    t = load_volume(p)
    if h is None: wrong(f'the header is refused and the voxels are read: {heard[0]}')
    if t.ndim!=4 or t.dtype!=torch.float32 or min(t.shape)<1 or tuple(t.shape[1:])!=tuple(h['shape']) or t.shape[0]!=h[
            'channels']:
        wrong(f'header {h["channels"]}×{h["shape"]}, voxels {tuple(t.shape)} {t.dtype}')
    if not np.isfinite(t.affine).all() or not np.isfinite(np.linalg.inv(t.affine)).all() or not np.allclose(t.affine,
            h['affine'], rtol=1e-4, atol=1e-4):
        wrong(f'affine {t.affine}, in the header {h["affine"]}')
    try: m = load_mask(p)
    except FastmedError as e: said(e, f)
    else:
        if tuple(m.shape)!=tuple(h['shape']) or m.dtype not in (torch.int32,torch.uint8) or t.shape[0]!=1:
            wrong(f'mask {tuple(m.shape)} {m.dtype}')
        x = t[0].numpy()
        if not np.allclose(m.numpy(), x, rtol=1e-6, atol=1.1e-3): wrong('the mask has other values than the image')
    return t
def said(e, f):
    "An error names the file and is no novel"
    msg = str(e)
    if not any(Path(o).name in msg for o in f): wrong(f'{type(e).__name__} names no file: {msg[:200]}')
    if len(msg)>900: wrong(f'{type(e).__name__} of {len(msg)} characters: {msg[:200]}')
def model(p, f):
    from fastmed.all import load_model
    return load_model(p, 'cpu')
def onnx(p, f):
    from fastmed.all import load_onnx
    return load_onnx(p)
def plan(p, f):
    "The command line: one line and exit code 2; what is right would begin to train, and is stopped there"
    import contextlib

    import fastmed.all
    from fastmed.cli import main
    class Right(BaseException): pass
    def stop(self, *a, **k): raise Right()
    fastmed.all.Comparison.run = stop
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try: code = main(['compare', str(p)])
        except Right: return
    if code!=2 or err.getvalue().count('\n')!=1 or len(err.getvalue())>1500:
        wrong(f'exit code {code}, {err.getvalue()[:300]!r}')
    from fastmed.core import InputError
    raise InputError(f'{p}: {err.getvalue()}')
def decathlon(p, f):
    from fastmed.all import scan_decathlon
    return scan_decathlon(p.parent)
def table(p, f):
    from fastmed.all import scan_folder
    df = scan_folder(p.parent, masks=None)
    if len(df)!=3: wrong(f'{len(df)} rows of 3 images')
def kept(p, f):
    "An entry of the store: one that is not what was written is made anew, so what is read is what was there"
    from fastmed.all import Preprocess, Store
    s = Store(Preprocess(codes=['background','a','b']), p.parent.parent/'c')
    src = p.parent/'scan.nii'
    for kind,add in (('image',s.add_image),('mask',s.add_mask)):
        src.write_bytes(f['scan.nii'])
        os.utime(src, (1,1))
        e = s.entry(kind, src)
        shutil.rmtree(e, ignore_errors=True)
        e = add(src)
        want = getattr(s, kind)(src).numpy().copy()
        for n in f:
            if n.startswith(kind): (e/n.removeprefix(f'{kind} ')).write_bytes(f[n])
        s._open.clear()
        t = getattr(s, kind)(src)
        if t.affine is None or t.ndim!=(4 if kind=='image' else 3) or not np.isfinite(t.affine).all():
            wrong(f'{kind}: {tuple(t.shape)}, {t.affine}')
        if not np.array_equal(t.numpy(), want): wrong(f'{kind}: other voxels than were written')
def archive(p, f):
    "Unpacked within its folder, whole or not at all; nothing but plain files"
    from fastmed.data import downloads
    home = p.parent/'home'
    home.mkdir()
    dest = home/'data'/'x'
    dest.parent.mkdir()
    try: downloads._unpack_beside(p, dest, f'file:{p.name}', f'{"0"*32} x\n')
    except BaseException:
        if dest.exists(): wrong('an archive was refused and lies unpacked')
        raise
    finally:
        out = [o for o in p.parent.rglob('*') if o!=p and home not in o.parents and o!=home]
        if out or Path('/tmp/fuzz_x').exists(): wrong(f'{out[:3]} lie outside')
    for o in dest.rglob('*'):
        if o.is_symlink() or not (o.is_file() or o.is_dir()): wrong(f'{o} is no plain file')
    if sum(o.stat().st_size for o in dest.rglob('*') if o.is_file())>1.1e9+200*p.stat().st_size:
        wrong('far more came out than went in')
def settings(p, f):
    from fastmed.all import Preprocess
    Preprocess.from_json(p.read_bytes().decode('utf-8', 'replace'))

class Seeds:
    "dict reader → list of dict file name → bytes, from files that are written into `d`"
    def __init__(self, d):
        self.d,self.out,self.rng = d,collections.defaultdict(list),np.random.default_rng(0)
        self.aff = np.array([[0,1.5,0,-20],[-.9,0,.1,31],[0,0,2.2,7],[0,0,0,1.]])
        self.a = np.round(self.rng.gamma(2, 200, (9,8,7)))
        self.m = (self.a>400).astype(np.uint8)+(self.a>700).astype(np.uint8)

    def add(self, reader, *names): self.out[reader].append({n:(self.d/n).read_bytes() for n in names})

    def nifti(self):
        import nibabel as nib
        d,a,aff = self.d,self.a,self.aff
        kinds = (('u1',nib.Nifti1Image,'<'),('i2',nib.Nifti1Image,'>'),('f4',nib.Nifti1Image,'<'),
                 ('f8',nib.Nifti2Image,'<'),('i8',nib.Nifti2Image,'>'))
        for i,(dt,cls,order) in enumerate(kinds):
            x = self.m if dt=='u1' else a
            im = cls(x.astype(dt), aff, header=cls.header_class(endianness=order), dtype=np.dtype(dt))
            im.set_qform(aff, 1)
            for reader,n in (('nifti',f'{i}.nii'), ('nifti.gz',f'{i}.nii.gz')):
                nib.save(im, d/n)
                self.add(reader, n)
        nib.save(nib.Nifti1Image(np.stack([a,a+1], -1).astype('i2'), aff), d/'4d.nii')
        self.add('nifti', '4d.nii')
        e = nib.Nifti1Image(self.m, aff)
        e.header.extensions.append(nib.nifti1.Nifti1Extension('comment', b'a note'))
        nib.save(e, d/'e.nii')
        self.add('nifti', 'e.nii')
        nib.save(nib.Nifti1Pair(a.astype('i2'), aff), d/'p.hdr')
        self.add('nifti pair', 'p.hdr', 'p.img')
        nib.save(nib.Spm2AnalyzeImage(a.astype('i2'), aff), d/'s.img')
        self.add('nifti pair', 's.hdr', 's.img')

    def sitk(self, x, cast=None):
        import SimpleITK
        i = SimpleITK.GetImageFromArray(np.ascontiguousarray(x.transpose(2,1,0)).astype(cast or x.dtype))
        i.SetSpacing((1.5,.9,2))
        i.SetOrigin((1,2,3))
        return i

    def itk(self):
        import SimpleITK
        d,a = self.d,self.a
        for ext in ('nrrd','mha'):
            for i,(x,c,z) in enumerate(((self.m,'u1',False),(a,'i2',True),(a,'f4',False),(a,'f8',True))):
                SimpleITK.WriteImage(self.sitk(x, c), str(d/f'{i}.{ext}'), z)
                self.add(ext, f'{i}.{ext}')
            two = np.stack([a,a], -1).transpose(2,1,0,3).astype('i2')
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(two, isVector=True), str(d/f'v.{ext}'), False)
            self.add(ext, f'v.{ext}')
        SimpleITK.WriteImage(self.sitk(a,'i2'), str(d/'q.mhd'), False)
        self.add('mhd + nhdr', 'q.mhd', 'q.raw')
        SimpleITK.WriteImage(self.sitk(a,'i2'), str(d/'w.nhdr'), False)
        self.add('mhd + nhdr', 'w.nhdr', *[o.name for o in d.glob('w.raw*')])

    def pictures(self):
        import SimpleITK
        d,a = self.d,self.a
        big = np.clip(self.rng.gamma(2, 40, (40,33,1)), 0, 255)
        for i,(x,c) in enumerate(((a[:,:,:1]%256,'u1'),(big,'u1'),(a[:,:,:1],'u2'))):
            SimpleITK.WriteImage(self.sitk(x, c)[:,:,0], str(d/f'{i}.png'))
            self.add('png', f'{i}.png')
            for z in (False, True):
                SimpleITK.WriteImage(self.sitk(x, c)[:,:,0], str(d/f'{i}{z:d}.tif'), z)
                self.add('tiff', f'{i}{z:d}.tif')
        SimpleITK.WriteImage(self.sitk(a,'f4'), str(d/'3d.tif'))
        self.add('tiff', '3d.tif')
        for n in ('x.jpg','x.bmp'):
            SimpleITK.WriteImage(self.sitk(big,'u1')[:,:,0], str(d/n))
            self.add('jpeg, bmp', n)

    def dicom(self):
        import pydicom
        series = slices(self.a, pydicom)
        self.out['dicom slice'] += [{'x.dcm':o} for o in series[:2]]
        self.out['dicom folder'] = [{f'{i}.dcm':o for i,o in enumerate(series[:6])}]
        self.out['dicom slice'].append({'m.dcm':slices(self.a, pydicom, frames=True)[0]})

    def real(self, data):
        import nibabel as nib
        import SimpleITK
        d,out,hip = self.d,self.out,data/'hippocampus'
        for f in sorted((hip/'imagesTr').glob('*.nii.gz'))[:2]+sorted((hip/'labelsTr').glob('*.nii.gz'))[:1]:
            b = f.read_bytes()
            out['nifti.gz'].append({'r.nii.gz':b})
            out['nifti'].append({'r.nii':gzip.decompress(b)})
            x = np.asarray(nib.load(f).dataobj)
            for ext in ('nrrd','mha'):
                SimpleITK.WriteImage(self.sitk(x), str(d/f'r.{ext}'), True)
                self.add(ext, f'r.{ext}')
        out['png'] += [{'r.png':o.read_bytes()} for o in sorted((data/'chest_xray'/'images').glob('*.png'))[:2]]
        out['dicom slice'] += [{'r.dcm':o.read_bytes()} for o in sorted((data/'ct_dicom').rglob('*.dcm'))[::25]]
        out['dataset.json'].append({'dataset.json':(hip/'dataset.json').read_bytes()[:6000], 'a.nii':b''})

    def tables(self):
        case = dict(image='./a.nii', label='./b.nii')
        facts = dict(name='x', modality={'0':'MR'}, labels={'0':'background','1':'a'}, training=[case])
        self.out['dataset.json'].append({'dataset.json':json.dumps(facts, indent=1).encode(), 'a.nii':b'', 'b.nii':b''})
        self.out['cases.csv'] = [{'cases.csv':b'case,subject,age\na,s1,30\nb,s1,31\nc,s2,29\n',
                                  **{f'images/{o}.nii.gz':b'' for o in 'abc'}}]

    def ours(self):
        import nibabel as nib

        from fastmed.all import Preprocess, Store
        d,out = self.d,self.out
        nib.save(nib.Nifti1Image(self.m, self.aff), d/'scan.nii')
        scan = (d/'scan.nii').read_bytes()
        s = Store(Preprocess(codes=['background','a','b']), d/'c')
        ei,em = s.add_image(d/'scan.nii'),s.add_mask(d/'scan.nii')
        kept = [('image',ei,'data.npy'), ('image',ei,'meta.json'), ('mask',em,'data.npy'), ('mask',em,'meta.json'),
                ('mask',em,'fg.npz')]
        out['store'] = [{f'{k} {n}':(e/n).read_bytes(), 'scan.nii':scan} for k,e,n in kept]
        pre = Preprocess(spacing=(1,1,2), normalize='ct', codes={'background':0,'a':[1,2]},
                         stats=[dict(lo=0.,hi=1.,mean=.5,std=.2)])
        out['preprocess.json'] = [{'p.json':pre.to_json().encode()}]
        out['plan.toml'] = [{'plan.toml':PLAN, **{f'd/{k}/{c}.nii':scan for k in ('images','labels') for c in 'abcd'}}]
        out['model file'],out['onnx'] = models(d)

    def archives(self):
        f = io.BytesIO()
        with tarfile.open(fileobj=f, mode='w') as t:
            for n in ('a/b.txt','a/c.txt','a/d/e.txt'):
                i = tarfile.TarInfo(n)
                i.size = 700
                t.addfile(i, io.BytesIO(bytes(700)))
        self.out['tar'] = [{'x.tar':f.getvalue()}]
        f = io.BytesIO()
        with zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z:
            for n in ('a/b.txt','a/c.txt','a/d/e.txt'): z.writestr(n, bytes(700))
        self.out['zip'] = [{'x.zip':f.getvalue()}]

PLAN = b"""data = "d"
folds = 2
seed = 1
budget = {updates = 2}
images = "images/*.nii"
masks = "labels/*.nii"
path = "out"

[arms.3D]
ndim = 3
patch = [8, 8, 8]

[arms.2D]
ndim = 2
context = 1
"""

def seeds(data):
    "dict reader → list of dict file name → bytes: real scans where there are any, and files written here"
    with tempfile.TemporaryDirectory() as d:
        s = Seeds(Path(d))
        for write in (s.nifti, s.itk, s.pictures, s.dicom): write()
        if data: s.real(data)
        for write in (s.tables, s.ours, s.archives): write()
    return s.out

def slices(a, pydicom, frames=False):
    "The bytes of a small CT series, or of one multi-frame file"
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian
    res = []
    for k in range(1 if frames else a.shape[2]):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.2'
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.3.4.{k+1}'
        ds.Modality,ds.PatientName,ds.PatientID = 'CT','Fuzz^A','1'
        ds.StudyInstanceUID,ds.SeriesInstanceUID,ds.FrameOfReferenceUID,ds.InstanceNumber = ('1.2.3','1.2.3.9',
                '1.2.3.8',k+1)
        ds.ImagePositionPatient,ds.ImageOrientationPatient,ds.PixelSpacing,ds.SliceThickness = [0,0,2.5*k],[1,0,0,0,1,
                0],[.8,.8],2.5
        ds.SamplesPerPixel,ds.PhotometricInterpretation,ds.Rows,ds.Columns = 1,'MONOCHROME2',a.shape[0],a.shape[1]
        ds.BitsAllocated,ds.BitsStored,ds.HighBit,ds.PixelRepresentation = 16,16,15,1
        ds.RescaleSlope,ds.RescaleIntercept = 1,-1024
        if frames: ds.NumberOfFrames = a.shape[2]
        ds.PixelData = (a.transpose(2,0,1) if frames else a[:,:,k]).astype('<i2').tobytes()
        f = io.BytesIO()
        pydicom.dcmwrite(f, ds, enforce_file_format=True)
        res.append(f.getvalue())
    return res

def models(d):
    "A small model file, and the same network as ONNX where onnx is installed"
    import nibabel as nib
    import pandas as pd

    from fastmed.all import VolumeDataLoaders, save_model, unet3d_learner
    rows = []
    for i in range(4):
        x = np.random.default_rng(i).random((16,16,16)).astype(np.float32)
        nib.save(nib.Nifti1Image(x, np.eye(4)), d/f'm{i}.nii')
        nib.save(nib.Nifti1Image((x>.5).astype(np.uint8), np.eye(4)), d/f'l{i}.nii')
        rows.append(dict(case=i, subject=i, image=d/f'm{i}.nii', mask=d/f'l{i}.nii'))
    dls = VolumeDataLoaders.from_df(pd.DataFrame(rows), codes=['background','a'], patch=8, bs=2, num_workers=0,
                                    device='cpu', cache=d/'cc', path=d)
    learn = unet3d_learner(dls, nf=4, depth=2)
    st,ox = [{'m.safetensors':save_model(learn, d/'m.safetensors').read_bytes()}],[]
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError: return st,ox
    from fastmed.all import export_onnx
    return st,[{'m.onnx':export_onnx(learn, d/'m.onnx').read_bytes()}]

READERS = ( # name, who changes the first file, how it is read, files of a whole run, of a quick one
    ('nifti', nifti, volume, 4000, 60), ('nifti.gz', packed(nifti), volume, 2500, 50),
        ('nifti pair', nifti, volume, 1200, 20), ('nrrd', lines(b'\n\n', NRRD), volume, 2500, 50),
        ('mha', lines(b'ElementDataFile', META), volume, 2500, 50),
    ('mhd + nhdr', lines(b'\x00', META+NRRD), volume, 900, 20), ('png', chunks, volume, 1500, 40),
        ('tiff', tiff, volume, 1200, 30), ('jpeg, bmp', blind, volume, 500, 10),
        ('dicom slice', dicom, volume, 1500, 30), ('dicom folder', dicom, volume, 500, 10),
    ('model file', sealed, model, 900, 20), ('onnx', resealed, onnx, 300, 5), ('plan.toml', text, plan, 500, 15),
        ('dataset.json', text, decathlon, 500, 20), ('cases.csv', text, table, 500, 20),
        ('preprocess.json', text, settings, 500, 20),
    ('store', blind, kept, 500, 15), ('tar', tars, archive, 1200, 30), ('zip', zips, archive, 1000, 30))
# what is cut short must not be read
WHOLE = ('nifti','nifti.gz','nrrd','mha','png','tiff','jpeg, bmp','dicom slice')

def make(reader, mutate, given, n):
    "File number `n`: ({name: bytes}, name of the changed file, whether it was merely cut)"
    rng = np.random.default_rng([SEED, zlib.crc32(reader.encode()), n])
    f = dict(pick(rng, given))
    other = pick(rng, given)
    names = [o for o in f if f[o]]
    name = names[0] if rng.random()<.8 or reader in ('store','plan.toml') else pick(rng, names)
    if n%25==0:                                                               # as it is; and cut at any place
        return f,name,False
    if n%25==1 and len(f[name])>200:
        k = int(rng.integers(100, len(f[name])-40))
        f[name] = f[name][:k]
        return f,name,True
    if reader=='mhd + nhdr' and rng.random()<.8:
        s = f[name].decode('latin-1')
        ls = s.split('\n')
        if '.raw' in name: f[name] = blind(rng, f[name], f[name])
        else:
            for _ in range(int(rng.integers(1, 4))): ls = text_lines(rng, ls, META if name.endswith('.mhd') else NRRD)
            f[name] = '\n'.join(ls).encode('latin-1', 'replace')
        return f,name,False
    f[name] = mutate(rng, f[name], next(iter(other.values())))
    return f,name,False

def attempt(reader, read, f, name, short, folder):
    "What comes of one file: 'read', 'refused', or 'wrong: …'"
    from fastmed.core import FastmedError
    for n,b in f.items():
        (folder/n).parent.mkdir(parents=True, exist_ok=True)
        (folder/n).write_bytes(b)
    p = folder if reader=='dicom folder' else folder/next(iter(f))
    try: read(p, f if reader=='store' else [*f, folder.name])
    except FastmedError as e:
        try: said(e, [''] if reader=='preprocess.json' else [*f, folder.name])
        except AssertionError as e2: return f'wrong: {e2}'
        return 'refused'
    except AssertionError as e: return f'wrong: {e or traceback.format_exc()[-600:]}'
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[::-1][:5]
        at = ' < '.join(f'{Path(o.filename).name}:{o.lineno}' for o in where)
        return f'wrong: {type(e).__name__}: {str(e)[:200]} | {at}'
    if short and reader in WHOLE: return 'wrong: a file that was cut short is read'
    return 'read'

def _status(k): return int(next(o for o in open('/proc/self/status') if o.startswith(k)).split()[1])*1024
def child(w, reader, mutate, read, given, todo, room):
    "Read the files `todo`, one line each to `w` before and after"
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for k in (0,1,2): os.dup2(null, k)
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    resource.setrlimit(resource.RLIMIT_CORE, (0,0))
    vm = _status('VmSize:')+room
    resource.setrlimit(resource.RLIMIT_AS, (vm,vm))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**31,2**31))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    base = _status('VmRSS:')
    with open('/proc/self/clear_refs', 'w') as f: f.write('5')
    with os.fdopen(w, 'w') as out, tempfile.TemporaryDirectory(dir=os.environ.get('FUZZ_TMP')) as tmp:
        for n in todo:
            f,name,short = make(reader, mutate, given, n)
            d = Path(tmp)/f'f{n}'
            d.mkdir()
            print(json.dumps([n, 'begin']), file=out, flush=True)
            if reader=='store' : shutil.rmtree(Path(tmp)/'c', ignore_errors=True)
            t0 = time.perf_counter()
            res = attempt(reader, read, f, name, short, d)
            print(json.dumps([n, res, time.perf_counter()-t0, max(0, _status('VmHWM:')-base)]), file=out, flush=True)
            shutil.rmtree(d, ignore_errors=True)
    os._exit(0)

class Tally:
    "What came of the files of one reader"
    def __init__(self): self.res,self.bad,self.peak,self.slow = collections.Counter(),[],0,0.

    def note(self, n, what, seconds, memory):
        self.slow,self.peak = max(self.slow, seconds),max(self.peak, memory)
        if seconds>SECONDS: self.fault('hangs', n, f'took {seconds:.0f} s')
        elif what.startswith('wrong'): self.fault('wrong', n, what)
        else: self.res[what] += 1

    def fault(self, kind, n, what):
        self.res[kind] += 1
        self.bad.append((n, what))

    def died(self, n, over, status):
        "A child that ended in the middle of file `n`"
        if over: self.fault('hangs', n, f'hang of over {SECONDS} s')
        elif os.WIFSIGNALED(status): self.fault('crashes', n, f'crash: signal {os.WTERMSIG(status)}')
        else: self.fault('crashes', n, f'exit {status>>8}')

    def row(self, reader):
        res = self.res
        return dict(reader=reader, files=sum(res.values()), refused=res['refused'], read=res['read'],
                    wrong=res['wrong'], crashes=res['crashes'], hangs=res['hangs'], slowest_s=round(self.slow, 2),
                    peak_mb=round(self.peak/2**20))

def follow(pid, r, tally):
    "Read what a child says until it ends: (files done, the one it was at or None, whether it hung)"
    buf,at,done = b'',None,0
    while True:
        if not select.select([r], [], [], SECONDS+2)[0]:
            os.kill(pid, signal.SIGKILL)
            return done,at,True
        got = os.read(r, 65536)
        if not got: return done,at,False
        *ls,buf = (buf+got).split(b'\n')
        for n,what,*more in map(json.loads, ls):
            at = n if what=='begin' else None
            if what=='begin': continue
            done += 1
            tally.note(n, what, *more)

def run(reader, mutate, read, given, todo, room=ROOM, batch=400):
    "Every file of `todo` in child processes; a dict of counts, and the list of what was wrong"
    todo,tally = list(todo),Tally()
    while todo:
        r,w = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(r)
                child(w, reader, mutate, read, given, todo[:batch], room)
            except BaseException: traceback.print_exc(file=open('/tmp/fuzz_child.log','a'))
            finally: os._exit(1)
        os.close(w)
        done,at,over = follow(pid, r, tally)
        os.close(r)
        _,status = os.waitpid(pid, 0)
        if at is not None:
            tally.died(at, over, status)
            done += 1
        elif not done: raise RuntimeError(f'{reader}: a child did nothing, status {status}')
        todo = todo[done:]
    return tally.row(reader),tally.bad

def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--quick', action='store_true', help='a few hundred files')
    p.add_argument('--reader', action='append', help='of these readers alone')
    p.add_argument('--scale', type=float, default=1., help='times as many files')
    p.add_argument('--first', type=int, default=0, help='number of the first file')
    p.add_argument('--only', type=int, help='this file alone, in this process')
    p.add_argument('--keep', help='folder for the file of --only')
    p.add_argument('--out', help='CSV')
    p.add_argument('--json', action='store_true', help='the table as JSON, on the last line')
    return p.parse_args()

def load_libraries():
    "Everything that a child needs, before the forks"
    import nibabel
    import SimpleITK
    import torch

    import fastmed.all
    import fastmed.cli  # noqa: F401
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    torch.set_num_threads(1)
    nibabel.imageglobals.logger.setLevel(60)

def one_file(a, name, mutate, read, given):
    "File number `--only`, in this process"
    f,which,short = make(name, mutate, given, a.only)
    d = Path(a.keep or tempfile.mkdtemp())/f'f{a.only}'
    d.mkdir(parents=True)
    print(d, which, short)
    print(attempt(name, read, f, which, short, d))

def write_table(fn, rows):
    def together(k):
        if k=='reader': return 'all'
        return (max if k in ('slowest_s','peak_mb') else sum)(r[k] for r in rows)
    with open(fn, 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]))
        w.writeheader()
        w.writerows([*rows, {k:together(k) for k in rows[0]}])

def main():
    a = options()
    data = os.environ.get('FASTMED_DATA')
    data = Path(data) if data and not a.quick else None
    load_libraries()
    t0 = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()): given = seeds(data)
    rows,bad = [],{}
    for name,mutate,read,n,quick in READERS:
        if a.reader and name not in a.reader or not given[name]: continue
        if a.only is not None:
            one_file(a, name, mutate, read, given[name])
            continue
        count = int((quick if a.quick else n)*a.scale)
        r,bad[name] = run(name, mutate, read, given[name], range(a.first, a.first+count))
        rows.append(r)
        if not a.json:
            print(*(f'{k} {v}' for k,v in r.items()), sep=', ', flush=True)
            for o in bad[name][:40]: print('   ', *o, flush=True)
    if a.json: print(json.dumps(dict(rows=rows, bad=bad)))
    elif rows: print(f'{sum(r["files"] for r in rows):,} files in {time.perf_counter()-t0:.0f} s')
    if a.out and rows: write_table(a.out, rows)
    sys.exit(1 if any(r['wrong']+r['crashes']+r['hangs'] for r in rows) else 0)

if __name__=='__main__': main()
