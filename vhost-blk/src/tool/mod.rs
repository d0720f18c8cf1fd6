//! The image tool: one job on one image, in a jail, reported over a socket.
//!
//! `bulkhead image` opens every file and starts this process, which locks itself down before it reads the
//! first byte of an image.

mod arguments;
mod convert;

use jailer::tell::{chain, tell};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use jailer::sandbox::{Locked, Role, lockdown};
use jailer::wire::{TransferError, send_message};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_spec::image::{FromImageTool, ImageInfo};

use crate::image::qcow2::{self, Progress};
use crate::image::{
    self, BlockFile, Format, HostFile, Image, ImageError, OpenOptions, Passphrase, SECTOR, lock,
};
use arguments::{Arguments, Job, Snapshot};

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
enum ToolError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    #[error("cannot report to the launcher")]
    Report(#[from] TransferError),
    #[error("{0}")]
    Refused(String),
}

/// Where reports go.
struct Reports(OwnedFd);

impl Reports {
    /// Sends what must not be lost, for which it waits as long as the launcher lives: that may be stopped, or wait for
    /// its terminal.
    fn send(&self, message: FromImageTool) -> Result<(), ToolError> {
        loop {
            match send_message(self.0.as_fd(), 0, message.clone()) {
                Err(TransferError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut ready, PollTimeout::NONE)
                        .map_err(io::Error::from)
                        .map_err(TransferError::Socket)?;
                }
                sent => return Ok(sent?),
            }
        }
    }

    /// Sends what may be lost: a launcher that does not listen, or is gone, changes nothing about the job.
    fn offer(&self, message: FromImageTool) {
        let _ = send_message(self.0.as_fd(), 0, message);
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let mut arguments = match Arguments::parse(lexopt::Parser::from_env()) {
        Ok(arguments) => arguments,
        Err(error) => {
            tell(format_args!(
                "bulkhead-image is started by `bulkhead image`: {error}"
            ));
            return ExitCode::from(2);
        }
    };
    let prepared = arguments.take_descriptors();
    let locked = match lockdown(Role::Image, arguments.seccomp) {
        Ok(locked) => locked,
        Err(error) => {
            tell(format_args!("{}", chain(&error)));
            return ExitCode::FAILURE;
        }
    };
    let (reports, files) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            tell(format_args!("{}", chain(&error)));
            return ExitCode::FAILURE;
        }
    };
    let last = match carry_out(locked, arguments.job, files, &reports) {
        Ok(()) => FromImageTool::Done,
        Err(error) => FromImageTool::Failed(chain(&error)),
    };
    match reports.send(last) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The job's files, opened by the launcher.
struct Files {
    image: OwnedFd,
    format: Format,
    backing: Vec<(Format, OwnedFd)>,
    options: OpenOptions,
    /// What `convert` writes.
    target: Option<OwnedFd>,
}

impl Files {
    /// The image's file alone, locked.
    fn file(self) -> Result<HostFile, ToolError> {
        lock(self.image.as_fd(), self.options.read_only)?;
        HostFile::new(self.image).map_err(|error| ToolError::Io("use the image's file", error))
    }

    fn qcow2_file(self, verb: &str) -> Result<HostFile, ToolError> {
        if self.format != Format::Qcow2 {
            return Err(ToolError::Refused(format!(
                "a {} image has no {verb}",
                self.format
            )));
        }
        self.file()
    }

    fn open(self) -> Result<Arc<dyn Image>, ToolError> {
        Ok(image::open(self.image, self.format, self.backing, &self.options)?)
    }
}

fn carry_out(_: Locked, job: Job, files: Files, reports: &Reports) -> Result<(), ToolError> {
    match job {
        Job::Info => info(files, reports),
        Job::Check(repair) => {
            let tell = |done, total| reports.offer(FromImageTool::Progress { done, total });
            let file = files.qcow2_file("refcounts to check")?;
            let result = qcow2::check(&file, repair, &Progress::told(&tell))?;
            reports.send(FromImageTool::Checked(result))
        }
        Job::Create(options) => create(files, options),
        Job::Convert(format, cluster_bits) => convert::convert(files, format, cluster_bits, reports),
        Job::Snapshot(snapshot) => {
            let tell = |done, total| reports.offer(FromImageTool::Progress { done, total });
            change_snapshots(&files.qcow2_file("snapshots")?, &snapshot, &Progress::told(&tell))
        }
        Job::Resize { size, shrink } => resize(files, size, shrink),
    }
}

fn info(files: Files, reports: &Reports) -> Result<(), ToolError> {
    if files.format == Format::Qcow2 {
        let (info, snapshots) = qcow2::info(&files.file()?)?;
        reports.send(FromImageTool::Info(Box::new(info)))?;
        return snapshots
            .into_iter()
            .try_for_each(|snapshot| reports.send(FromImageTool::Snapshot(snapshot)));
    }
    let file = files.image.try_clone();
    let file_size = file
        .and_then(HostFile::new)
        .and_then(|file| file.size())
        .map_err(|error| ToolError::Io("find the size of the image's file", error))?;
    let info = ImageInfo {
        virtual_size: files.open()?.capacity(),
        file_size,
        qcow2: None,
    };
    reports.send(FromImageTool::Info(Box::new(info)))
}

/// Without a size, that of the backing file.
fn create(mut files: Files, mut options: arguments::Create) -> Result<(), ToolError> {
    if options.size.is_none() {
        let layers = std::mem::take(&mut files.backing);
        let mut layers = layers.into_iter();
        let (format, top) = layers
            .next()
            .ok_or_else(|| ToolError::Refused("neither a size nor a backing file was given".into()))?;
        let read_only = OpenOptions {
            read_only: true,
            ..files.options.clone()
        };
        options.size = Some(image::open(top, format, layers.collect(), &read_only)?.capacity());
    }
    let format = files.format;
    refuse_ignored(format, "cluster size", options.cluster_bits.is_some())?;
    refuse_ignored(format, "refcounts", options.lazy_refcounts)?;
    let file = files.file()?;
    make(&file, format, &options.into_qcow2())
}

/// Refuses a choice that means nothing to an image of this format.
fn refuse_ignored(format: Format, what: &str, chosen: bool) -> Result<(), ToolError> {
    if chosen && format != Format::Qcow2 {
        return Err(ToolError::Refused(format!("a {format} image has no {what}")));
    }
    Ok(())
}

/// Writes an empty disk to an empty file.
fn make(file: &dyn BlockFile, format: Format, options: &qcow2::CreateOptions) -> Result<(), ToolError> {
    let failed = |error| ToolError::Io("make the image", error);
    check_size(options.size)?;
    match format {
        Format::Raw => file.grow_to(options.size).map_err(failed)?,
        Format::Qcow2 => qcow2::create(file, options)?,
        other => return Err(ToolError::Refused(format!("{other} images can only be read"))),
    }
    file.sync().map_err(failed)
}

fn check_size(size: u64) -> Result<(), ToolError> {
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(ToolError::Refused(format!(
            "a disk of {size} bytes: a size is a positive multiple of {SECTOR}"
        )));
    }
    Ok(())
}

fn change_snapshots(file: &HostFile, snapshot: &Snapshot, progress: &Progress<'_>) -> Result<(), ToolError> {
    match snapshot {
        Snapshot::Take(name) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            qcow2::take(file, name, now.unwrap_or(Duration::ZERO), progress)?;
        }
        Snapshot::Apply(name) => qcow2::apply(file, name, progress)?,
        Snapshot::Delete(name) => qcow2::delete(file, name, progress)?,
    }
    Ok(())
}

fn resize(files: Files, size: u64, shrink: bool) -> Result<(), ToolError> {
    let failed = |error| ToolError::Io("resize the image", error);
    let format = files.format;
    if !matches!(format, Format::Raw | Format::Qcow2) {
        return Err(ToolError::Refused(format!("{format} images can only be read")));
    }
    check_size(size)?;
    if format == Format::Raw {
        refuse_ignored(format, "passphrase", files.options.passphrase.is_some())?;
        return resize_raw(&files.file()?, size, shrink);
    }
    let plain = HostFile::new(files.image.try_clone().map_err(failed)?).map_err(failed)?;
    let image = files.open()?;
    let old = image.capacity();
    if size >= old {
        image.grow(size, None)?;
        return image.close().map_err(failed);
    }
    check_shrink(size, old, shrink)?;
    qcow2::check_shrinkable(&plain, size)?;
    // What comes back when the disk grows again reads as zeros.
    image.write_zeroes(size, old - size, true).map_err(failed)?;
    image.close().map_err(failed)?;
    drop(image);
    Ok(qcow2::shrink(&plain, size)?)
}

fn check_shrink(size: u64, old: u64, shrink: bool) -> Result<(), ToolError> {
    if size < old && !shrink {
        return Err(ToolError::Refused(format!(
            "{size} bytes are fewer than the disk's {old}: what lies behind is lost; say so with --shrink"
        )));
    }
    Ok(())
}

/// Of a file of any length: also of one that is no disk yet, as it is empty or has no whole sectors.
fn resize_raw(file: &dyn BlockFile, size: u64, shrink: bool) -> Result<(), ToolError> {
    let failed = |error| ToolError::Io("resize the image", error);
    let old = file.size().map_err(failed)?;
    check_shrink(size, old, shrink)?;
    if size < old && file.has_fixed_size() {
        return Err(ToolError::Refused(
            "a block device cannot be made smaller here: use what made it".into(),
        ));
    }
    // A device that has not grown by itself does not.
    let done = file.grow_to(size).and_then(|()| file.cut_to(size));
    done.and_then(|()| file.sync()).map_err(failed)
}

/// The passphrase in an inherited descriptor.
fn passphrase(number: i32) -> Result<Arc<Passphrase>, ToolError> {
    vhost_daemon::inherited(number)
        .and_then(|fd| Passphrase::read(std::fs::File::from(fd)))
        .map(Arc::new)
        .map_err(|error| ToolError::Io("read the passphrase", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arguments::Create;
    use jailer::wire::{Received, receive_message};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixDatagram;
    use std::thread;

    fn files(image: &File, format: Format, target: Option<&File>) -> Files {
        Files {
            image: image.try_clone().unwrap().into(),
            format,
            backing: Vec::new(),
            options: OpenOptions::default(),
            target: target.map(|file| file.try_clone().unwrap().into()),
        }
    }

    fn length(file: &File) -> u64 {
        file.metadata().unwrap().len()
    }

    #[test]
    fn a_disk_has_whole_sectors() {
        for format in [Format::Raw, Format::Qcow2] {
            for (size, sound) in [(0, false), (511, false), (512, true), (1000, false)] {
                let image = tempfile::tempfile().unwrap();
                let options = Create {
                    size: Some(size),
                    ..Create::default()
                };
                let made = create(files(&image, format, None), options);
                assert_eq!(made.is_ok(), sound, "{format} of {size} bytes: {made:?}");
            }
        }
    }

    #[test]
    fn a_disk_stays_of_whole_sectors() {
        for format in [Format::Raw, Format::Qcow2] {
            let image = tempfile::tempfile().unwrap();
            let options = Create {
                size: Some(8192),
                ..Create::default()
            };
            create(files(&image, format, None), options).unwrap();
            let before = length(&image);
            for size in [0, 1000, 4095] {
                let error = resize(files(&image, format, None), size, true).unwrap_err();
                assert!(error.to_string().contains("multiple of 512"), "{format}: {error}");
                assert_eq!(length(&image), before, "{format} to {size}");
            }
            resize(files(&image, format, None), 512, true).unwrap();
            assert_eq!(files(&image, format, None).open().unwrap().capacity(), 512);
        }
    }

    /// As they come: what has no whole sectors is no disk, and is made one.
    #[test]
    fn raw_files_of_any_length_become_disks() {
        for (before, shrink) in [(0, false), (1000, false), (100_000, true)] {
            let image = tempfile::tempfile().unwrap();
            image.write_all_at(&vec![7; before], 0).unwrap();
            assert!(files(&image, Format::Raw, None).open().is_err());
            if shrink {
                let error = resize(files(&image, Format::Raw, None), 8192, false).unwrap_err();
                assert!(error.to_string().contains("--shrink"), "{error}");
                assert_eq!(length(&image), before as u64);
            }
            resize(files(&image, Format::Raw, None), 8192, shrink).unwrap();
            let mut bytes = vec![1; 8192];
            image.read_exact_at(&mut bytes, 0).unwrap();
            let mut expected = vec![7; before];
            expected.resize(8192, 0);
            assert!(bytes == expected, "{before} bytes");
            assert_eq!(files(&image, Format::Raw, None).open().unwrap().capacity(), 8192);
        }
    }

    /// Nothing but that it is one.
    struct Device;

    impl BlockFile for Device {
        fn size(&self) -> io::Result<u64> {
            Ok(8192)
        }

        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Ok(())
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            Ok(())
        }

        fn zero_range(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn grow_to(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn secure_range(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn cut_to(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }

        fn has_fixed_size(&self) -> bool {
            true
        }

        fn identity(&self) -> io::Result<(u64, u64)> {
            Ok((0, 0))
        }
    }

    #[test]
    fn a_device_is_not_cut() {
        let error = resize_raw(&Device, 512, true).unwrap_err();
        assert!(error.to_string().contains("block device"), "{error}");
    }

    #[test]
    fn what_a_format_has_not_is_refused() {
        for (cluster_bits, lazy_refcounts, what) in
            [(Some(16), false, "cluster size"), (None, true, "refcounts")]
        {
            let options = || Create {
                size: Some(1 << 20),
                cluster_bits,
                lazy_refcounts,
                ..Create::default()
            };
            let image = tempfile::tempfile().unwrap();
            let error = create(files(&image, Format::Raw, None), options()).unwrap_err();
            assert_eq!(error.to_string(), format!("a raw image has no {what}"));
            assert_eq!(length(&image), 0, "it was made all the same");
            create(files(&image, Format::Qcow2, None), options()).unwrap();
        }
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.set_len(1 << 20).unwrap();
        let (ours, _theirs) = UnixDatagram::pair().unwrap();
        let reports = Reports(ours.into());
        let convert = |bits| {
            let files = files(&source, Format::Raw, Some(&target));
            convert::convert(files, Format::Raw, bits, &reports)
        };
        let error = convert(Some(16)).unwrap_err();
        assert_eq!(error.to_string(), "a raw image has no cluster size");
        assert_eq!(length(&target), 0);
        convert(None).unwrap();
        assert_eq!(length(&target), 1 << 20);
    }

    #[test]
    fn a_launcher_that_was_stopped_hears_the_end() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.set_len(64 << 20).unwrap();
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let reports = Reports(ours.into());
        let word = |done| FromImageTool::Progress { done, total: 1 };
        while send_message(reports.0.as_fd(), 0, word(1)).is_ok() {}
        let files = files(&source, Format::Raw, Some(&target));
        convert::convert(files, Format::Raw, None, &reports).unwrap();
        let sender = thread::spawn(move || reports.send(FromImageTool::Done));
        let heard = || match receive_message(theirs.as_fd()).unwrap() {
            Received::Message(_, message) => Some(message),
            _ => {
                let mut ready = [PollFd::new(theirs.as_fd(), PollFlags::POLLIN)];
                assert_eq!(
                    poll(&mut ready, PollTimeout::from(10_000_u16)),
                    Ok(1),
                    "nothing more is said"
                );
                None
            }
        };
        while heard() != Some(FromImageTool::Done) {}
        sender.join().unwrap().unwrap();
    }
}
