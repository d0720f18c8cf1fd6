//! Opening: every refusal comes before the first change of the file.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};

use super::bitmaps::Preparation;
use super::cache::Cache;
use super::entry::L1Entry;
use super::extensions::EncryptionHeader;
use super::geometry::Geometry;
use super::grow::Growth;
use super::header::{Header, RAW_DATA};
use super::progress::Progress;
use super::refcount::{Refcounts, words};
use super::repair::{MOST_L2_AT_OPEN, Recount};
use super::tables::Table;
use super::{Kind, Meta, Qcow2, alloc, free, header, holes, tables};
use crate::image::luks::{self, Cipher, CryptFile};
use crate::image::{BlockFile, Image, ImageError, OpenOptions};

impl Qcow2 {
    /// Whether the header asks for encryption of any kind (`crypt_method`); false if it is no header.
    ///
    /// # Errors
    /// When the host cannot read.
    pub(in crate::image) fn is_encrypted(file: &dyn BlockFile) -> Result<bool, ImageError> {
        let mut method = [0; 4];
        file.read_at(&mut method, header::CRYPT_METHOD_OFFSET)
            .map_err(ImageError::io("read the qcow2 header"))?;
        Ok(method != [0; 4])
    }

    /// Opens an image in `file`; `data` is its external data file, `backing` what lies below it.
    ///
    /// # Errors
    /// [`ImageError::Refused`] names the field that is not acceptable; the files are unchanged then.
    pub fn open(
        file: Arc<dyn BlockFile>,
        data: Option<Arc<dyn BlockFile>>,
        backing: Option<Arc<dyn Image>>,
        options: &OpenOptions,
    ) -> Result<Self, ImageError> {
        if file
            .needs_alignment()
            .map_err(ImageError::io("examine the image's file"))?
        {
            return Err(ImageError::refused(
                "file",
                "qcow2 cannot be used with O_DIRECT: open it without",
            ));
        }
        let (mut header, mut size) = read_header(&*file)?;
        check_parts(&header, data.is_some(), backing.is_some())?;
        let mut tables = tables::snapshots(&header, &*file, size)?;
        let cipher = cipher(&*file, &header, options)?;
        if !options.read_only {
            check_writable(&header)?;
            if header.is_dirty() {
                tracing::warn!("the image was not closed properly; rebuilding its refcounts");
                let progress = Progress::untold();
                let recount = Recount::of(&*file, header, &tables, size, MOST_L2_AT_OPEN, &progress)?;
                recount.secure(&*file)?.carry_out(&*file, &progress)?;
                (header, size) = read_header(&*file)?;
                tables = tables::snapshots(&header, &*file, size)?;
            }
        }
        let geometry = header.geometry;
        let meta = load(&*file, &header, &tables, size, options)?;
        let data = data.unwrap_or_else(|| Arc::clone(&file));
        Ok(Self {
            data: match cipher {
                Some(cipher) => Arc::new(CryptFile::new(data, cipher)),
                None => data,
            },
            file,
            geometry,
            size: AtomicU64::new(header.size),
            limit: AtomicU64::new(header.size),
            growth: Mutex::new(Growth::new(header.excludes_resize())),
            compression: header.compression,
            raw_data: header.autoclear & RAW_DATA != 0,
            backing,
            read_only: options.read_only,
            corrupt: AtomicBool::new(false),
            meta: Mutex::new(meta),
            allocated: Condvar::new(),
            in_flight: [AtomicU64::new(0), AtomicU64::new(0)],
            inflated: Mutex::new(None),
        })
    }
}

pub(super) fn read_header(file: &dyn BlockFile) -> Result<(Header, u64), ImageError> {
    let size = file
        .size()
        .map_err(ImageError::io("find the size of the image's file"))?;
    Ok((Header::read(file, size)?, size))
}

/// Compares what the header names with what the launcher passed; no name is ever opened.
fn check_parts(header: &Header, has_data: bool, has_backing: bool) -> Result<(), ImageError> {
    match (header.names_backing, has_backing) {
        (true, false) => Err(ImageError::refused(
            "backing file",
            "the image names one but none was passed; pass each layer in order",
        )),
        (false, true) => Err(ImageError::refused(
            "backing file",
            "one was passed but the image names none",
        )),
        _ => Ok(()),
    }?;
    match (header.geometry.external_data, has_data) {
        (true, false) => Err(ImageError::refused(
            "external data file",
            "the image keeps its data in another file but none was passed",
        )),
        (false, true) => Err(ImageError::refused(
            "external data file",
            "one was passed but the image has none",
        )),
        _ => Ok(()),
    }
}

/// The cipher of an encrypted image's data.
fn cipher(
    file: &dyn BlockFile,
    header: &Header,
    options: &OpenOptions,
) -> Result<Option<Cipher>, ImageError> {
    let Some(EncryptionHeader { offset, length }) = header.extensions.encryption else {
        return Ok(None);
    };
    match &options.passphrase {
        Some(passphrase) => luks::unlock(file, offset, length, passphrase).map(Some),
        None => {
            luks::check(file, offset, length)?;
            Err(ImageError::refused(
                "crypt_method",
                "the image is encrypted (LUKS) and no passphrase was passed",
            ))
        }
    }
}

fn check_writable(header: &Header) -> Result<(), ImageError> {
    if header.is_corrupt() {
        return Err(ImageError::refused(
            "incompatible_features",
            "the corrupt bit is set: the image can only be opened read-only until it is repaired",
        ));
    }
    Ok(())
}

fn load(
    file: &dyn BlockFile,
    header: &Header,
    tables: &[Table],
    size: u64,
    options: &OpenOptions,
) -> Result<Meta, ImageError> {
    let geometry = &header.geometry;
    let file_end = size.next_multiple_of(geometry.cluster_size());
    let mut bytes = vec![0; header.l1_size as usize * 8];
    file.read_at(&mut bytes, header.l1_offset)
        .map_err(ImageError::io("read the L1 table"))?;
    let l1: Vec<u64> = words(&bytes).collect();
    let (refcounts, kinds) = if options.read_only {
        (Refcounts::none(geometry), HashMap::new())
    } else {
        let refcounts = Refcounts::load(file, header, file_end)?;
        let kinds = kinds(geometry, tables, &refcounts, &l1, file_end)?;
        (refcounts, kinds)
    };
    Ok(Meta {
        l1,
        l1_offset: header.l1_offset,
        l2: Cache::new(options.l2_cache_size, geometry.cluster_size()),
        refcounts,
        file_end,
        kinds,
        reserve: alloc::Reserve::new(),
        freed: free::Freed::default(),
        holes: holes::Holes::default(),
        busy: Vec::new(),
        fresh: HashSet::new(),
        epoch: 0,
        unprepared: Preparation::of(header),
    })
}

/// What each host cluster of the metadata is used for.
fn kinds(
    geometry: &Geometry,
    tables: &[Table],
    refcounts: &Refcounts,
    l1: &[u64],
    file_end: u64,
) -> Result<HashMap<u64, Kind>, ImageError> {
    let mut kinds = HashMap::from([(0, Kind::Header)]);
    for table in tables {
        for cluster in table.clusters(geometry) {
            kinds.insert(cluster, Kind::Table(table.name));
        }
    }
    for block in refcounts.table.iter().filter(|block| **block != 0) {
        if let Some(other) = kinds.insert(geometry.cluster_of(*block), Kind::Refblock) {
            return Err(ImageError::refused(
                "refcount table",
                format!("the block at {block:#x} overlaps the {other}"),
            ));
        }
    }
    // What an L1 entry points to is judged when it is used: one bad entry leaves the rest of the disk.
    for raw in l1 {
        if let Ok(Some(L1Entry { table, .. })) = L1Entry::decode(*raw, geometry, file_end) {
            kinds
                .entry(geometry.cluster_of(table))
                .and_modify(|kind| {
                    if *kind == Kind::L2 {
                        *kind = Kind::SharedL2;
                    }
                })
                .or_insert(Kind::L2);
        }
    }
    Ok(kinds)
}
