//! The files of an image, opened, and how their data is moved.

use crate::device::BlkError;
use crate::image::{self, BlockFile, Format, Image, ImageError, OpenOptions, Passphrase, Way};
use crate::io::{CacheMode, DirectFile, Fence, IoMode, RestrictedRing, await_direct_writes};
use crate::options::{Options, Place};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::io::{self, Seek as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// How long the locks of a predecessor that was killed may outlast it: as long as its io_uring, which waits
/// for the writes under way.
const LETTING_GO: Duration = Duration::from_secs(2);
/// File systems in memory.
const IN_MEMORY: [FsType; 3] = [TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC];
/// `linux/magic.h`; the C library has none.
const RAMFS_MAGIC: FsType = FsType(0x8584_58F6);

/// What the image is made of, opened.
pub(crate) struct Files {
    /// Where the top is, for messages.
    place: Place,
    format: Format,
    top: OwnedFd,
    /// The top once more, past the page cache.
    direct: Option<OwnedFd>,
    backing: Vec<(Format, OwnedFd)>,
    data: Option<OwnedFd>,
    /// Whether direct writes of a predecessor were waited for.
    fence: Fence,
}

impl Files {
    /// Opens what the flags name.
    ///
    /// # Errors
    /// [`BlkError`] says which.
    pub(crate) fn open(options: &Options) -> Result<Self, BlkError> {
        let place = options
            .image
            .as_ref()
            .ok_or(BlkError::Missing("one of --blk-file and --blk-fd is needed"))?;
        let format = options.format.ok_or(BlkError::Missing("--format is needed"))?;
        let open = |place: &Place, read_only| {
            place
                .open(read_only)
                .map_err(|error| BlkError::Open(place.clone(), error))
        };
        let top = open(place, options.read_only)?;
        let mut backing = Vec::new();
        for (format, place) in &options.backing {
            backing.push((*format, open(place, true)?));
        }
        let data = options.data_file.as_ref();
        let data = data.map(|place| open(place, options.read_only)).transpose()?;
        let mut files = Self {
            place: place.clone(),
            format,
            top,
            direct: None,
            backing,
            data,
            fence: Fence::Passed,
        };
        if options.io != IoMode::Sync {
            files.await_locks(options)?;
        }
        if options.cache == CacheMode::None {
            files.pass_cache(options)?;
        }
        Ok(files)
    }

    /// A predecessor that was killed may hold its locks a little longer: by what its ring has under way.
    fn await_locks(&self, options: &Options) -> Result<(), BlkError> {
        for file in [Some(&self.top), self.data.as_ref()].into_iter().flatten() {
            image::lock_within(file.as_fd(), options.read_only, LETTING_GO)
                .map_err(|error| BlkError::Image(self.place.clone(), error))?;
        }
        Ok(())
    }

    fn pass_cache(&mut self, options: &Options) -> Result<(), BlkError> {
        let cannot = |error| BlkError::Open(self.place.clone(), error);
        if !options.read_only {
            self.fence = await_direct_writes(self.top.as_fd()).map_err(cannot)?;
        }
        let direct = match options.direct {
            Some(number) => Place::Fd(number).open(options.read_only),
            None => self.place.open_with(options.read_only, libc::O_DIRECT),
        };
        self.direct = Some(direct.map_err(cannot)?);
        Ok(())
    }

    /// Whether a flush waits for a disk of the host's, or for another host.
    pub(crate) fn wait(&self) -> bool {
        let mut written = [Some(&self.top), self.data.as_ref()].into_iter().flatten();
        written.any(|file| !is_in_memory(file.as_fd()))
    }

    /// Whether any can say that a read of it would wait.
    fn answer_at_once(&self) -> bool {
        let top = self.direct.is_none().then_some(&self.top);
        let backing = self.backing.iter().map(|(_, file)| file);
        top.into_iter()
            .chain(&self.data)
            .chain(backing)
            .any(|file| image::answers_at_once(file.as_fd()))
    }

    /// What `--io` and the host allow, and a ring for each queue where one is used.
    ///
    /// # Errors
    /// `--io=uring` where the host has none.
    pub(crate) fn engine(
        &self,
        options: &Options,
        num_queues: u16,
    ) -> Result<(Engine, Vec<RestrictedRing>), BlkError> {
        let calls = Engine {
            cached: Way::Calls,
            direct: Way::Calls,
        };
        let past_cache = self.direct.is_some();
        let fenced = self.fence == Fence::Passed;
        let engine = match options.io {
            IoMode::Sync => calls,
            IoMode::Uring => {
                if past_cache && !fenced {
                    tracing::warn!("--io=uring: nothing waits for the writes of a process that is killed");
                }
                Engine {
                    cached: Way::Ring,
                    direct: Way::Ring,
                }
            }
            IoMode::Auto => {
                if past_cache && !fenced {
                    tracing::info!("nothing waits for direct writes here: each queue moves one at a time");
                }
                let taken = |way, uses| if uses { way } else { Way::Calls };
                Engine {
                    cached: taken(Way::Attempt, self.answer_at_once()),
                    direct: taken(Way::Ring, past_cache && fenced),
                }
            }
        };
        if engine == calls {
            return Ok((calls, Vec::new()));
        }
        let writes = !options.read_only && [engine.cached, engine.direct].contains(&Way::Ring);
        let rings: io::Result<Vec<_>> = (0..num_queues).map(|_| RestrictedRing::new(writes)).collect();
        match rings {
            Err(error) if options.io == IoMode::Auto => {
                tracing::info!(%error, "the host refuses an io_uring: a queue waits for one request at a time");
                Ok((calls, Vec::new()))
            }
            rings => Ok((engine, rings.map_err(BlkError::Uring)?)),
        }
    }

    /// The image in them; its content is looked at here for the first time.
    ///
    /// # Errors
    /// What is in them is refused, or somebody else uses them.
    pub(crate) fn into_image(self, options: &Options, engine: Engine) -> Result<Arc<dyn Image>, BlkError> {
        let defaults = OpenOptions::default();
        let settings = OpenOptions {
            read_only: options.read_only,
            data_file: self.data.map(Arc::new),
            passphrase: options.key.map(read_passphrase).transpose()?.map(Arc::new),
            l2_cache_size: options.l2_cache_size.unwrap_or(defaults.l2_cache_size),
            way: engine.cached,
            writes_lost: options.writes_lost,
            ..defaults
        };
        let image = match self.direct {
            Some(direct) => open_direct((self.top, direct), self.format, self.backing, &settings, engine),
            None => image::open(self.top, self.format, self.backing, &settings),
        };
        image.map_err(|error| BlkError::Image(self.place, error))
    }
}

/// Whether a file is nowhere but in the host's memory.
fn is_in_memory(file: BorrowedFd<'_>) -> bool {
    // Where a block device's node is says nothing of the device.
    let is_file =
        |status: FileStat| SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
    fstat(file).is_ok_and(is_file)
        && fstatfs(file).is_ok_and(|system| IN_MEMORY.contains(&system.filesystem_type()))
}

fn read_passphrase(number: RawFd) -> Result<Passphrase, BlkError> {
    vhost_daemon::inherited(number)
        .and_then(|fd| {
            let mut file = File::from(fd);
            // A predecessor may have read it through the same open file description; a pipe cannot be
            // rewound, and need not be.
            let _ = file.rewind();
            Passphrase::read(file)
        })
        .map_err(BlkError::Key)
}

/// The top, as both its descriptors, past the page cache; what lies below it is read through it.
fn open_direct(
    (top, direct): (OwnedFd, OwnedFd),
    format: Format,
    backing: Vec<(Format, OwnedFd)>,
    settings: &OpenOptions,
    engine: Engine,
) -> Result<Arc<dyn Image>, ImageError> {
    let use_file = ImageError::io("use the image's file without the page cache");
    image::lock(top.as_fd(), settings.read_only)?;
    let top = image::host_file(top, settings)
        .and_then(|top| DirectFile::new(top, direct))
        .map_err(use_file)?
        .moved_by(engine.direct);
    let mut layers: Vec<(Format, Arc<dyn BlockFile>)> = vec![(format, Arc::new(top))];
    for (format, fd) in backing {
        image::lock(fd.as_fd(), true)?;
        let file = image::HostFile::new(fd).map_err(ImageError::io("use a backing file"))?;
        layers.push((format, Arc::new(file.moved_by(settings.way))));
    }
    image::open_layers(layers, image::data_file(settings)?, settings)
}

/// How queues move data of files that are read through the page cache, and past it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Engine {
    cached: Way,
    direct: Way,
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn only_what_is_in_memory_is_flushed_at_once() {
        let memory = memfd_create(c"image", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(is_in_memory(memory.as_fd()));
        // A file system that cannot say whether a read would wait, as NFS and FUSE.
        let other = File::open("/proc/self/stat").unwrap();
        assert!(!image::answers_at_once(other.as_fd()));
        assert!(!is_in_memory(other.as_fd()));
    }

    #[test]
    fn the_rings_of_a_disk_that_is_only_read_only_read() {
        let image = tempfile::NamedTempFile::new().unwrap();
        for read_only in [true, false] {
            let options = Options {
                image: Some(Place::Path(image.path().to_owned())),
                format: Some(Format::Raw),
                io: IoMode::Uring,
                read_only,
                ..Options::default()
            };
            let (_, rings) = match Files::open(&options).unwrap().engine(&options, 1) {
                Err(error) if crate::io::is_refused() => return eprintln!("no io_uring here: {error}"),
                engine => engine.unwrap(),
            };
            assert_eq!(rings[0].writes(), !read_only);
        }
    }
}
