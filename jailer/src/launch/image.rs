//! `bulkhead image`: opens every file, and has a jailed process look at what is in them.
//!
//! This process, which can open paths, parses nothing of an image: names of backing files come from the
//! jailed tool as text, and are opened only where images may lie.

mod new_file;
mod words;

use self::new_file::NewFile;
use self::words::Words;
use super::chain::{folder_of, lexical_join, open_backing, open_image};
use super::children::describe;
pub(crate) use super::disk::Key;
use super::identity;
pub(crate) use super::inputs::open_key;
use super::spawn::{binary_folder, pair};
use crate::failure::Failure;
use crate::sandbox::child::{Child, Parent, Program, Starting, open_proc, start};
use crate::sandbox::{EXIT_NO_MEMORY, Role, SeccompMode, most_open_files};
use crate::tell::tell;
use crate::wire::{Received, receive_message};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::sys::socket::SockType;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Whence, lseek};
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use vm_spec::control::exit_code;
use vm_spec::image::{FromImageTool, ImageInfo, MAX_CHAIN, MAX_SNAPSHOTS, SnapshotInfo};
use vm_spec::spec::ImageFormat;
use vm_spec::supervise::ExitStatus;

/// Most that the tool may map: it holds tables and a few clusters, never an image.
const ADDRESS_SPACE: u64 = 4 << 30;
/// What helps where the image's own word for its backing file does not do.
const NAME_IT: &str = "name it in the image: qemu-img rebase -u -b BASE -F FORMAT IMAGE";
pub(super) const BINARY: &str = "bulkhead-image";
/// How long the tool may be silent: it clears what a large image loses, and makes sure of space, without a word.
const PATIENCE_MS: i32 = 600_000;

/// What all verbs share.
#[derive(Debug)]
pub(crate) struct Setting {
    /// Folders that backing files may lie in, beside each image's own.
    pub(crate) folders: Vec<PathBuf>,
    /// What holds the passphrase, for each run of the tool.
    pub(crate) key: Option<OwnedFd>,
    pub(crate) seccomp: SeccompMode,
}

/// An image and the layers below it, opened.
pub(crate) struct Opened {
    path: PathBuf,
    layers: Vec<(ImageFormat, File)>,
    /// The top layer's external data file.
    data_file: Option<File>,
    read_only: bool,
    /// It is being made.
    new: Option<NewFile>,
}

/// What `info` says.
pub(crate) struct Described {
    pub(crate) info: ImageInfo,
    pub(crate) snapshots: Vec<SnapshotInfo>,
}

/// Whether an image is opened for writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Access {
    Read,
    Write,
}

impl Opened {
    /// The image alone.
    pub(crate) fn alone(path: &Path, format: ImageFormat, access: Access) -> Result<Self, Failure> {
        let read_only = access == Access::Read;
        Ok(Self {
            path: path.to_owned(),
            layers: vec![(format, open_image("image", path, read_only)?)],
            data_file: None,
            read_only,
            new: None,
        })
    }

    /// The image with its external data file.
    pub(crate) fn with_data_file(mut self, path: &Path) -> Result<Self, Failure> {
        self.data_file = Some(open_image("--data-file", path, self.read_only)?);
        Ok(self)
    }

    /// A new, empty file, for [`Self::conclude`]. From here on the signals that end us are waited for by
    /// [`Self::run`] alone.
    pub(crate) fn new_file(path: &Path, format: ImageFormat) -> Result<Self, Failure> {
        let new = NewFile::make(path)?;
        let file = new
            .handle()
            .map_err(|e| Failure::host("image: no descriptor").because(&e))?;
        Ok(Self {
            path: path.to_owned(),
            layers: vec![(format, file)],
            data_file: None,
            read_only: false,
            new: Some(new),
        })
    }

    /// The image with all that lies below it, each named by the one above and opened only where images
    /// may lie.
    pub(crate) fn chain(
        setting: &Setting,
        path: &Path,
        format: ImageFormat,
        access: Access,
    ) -> Result<Self, Failure> {
        let all = Self::alone(path, format, access)?;
        let folder = folder_of("image", path)?;
        let allowed = allowed(setting, &folder)?;
        all.with_backing(setting, folder, &allowed, MAX_CHAIN)
    }

    /// What a new image at `path` is to call `name`, with all that lies below it: opened as whoever opens the
    /// new image will.
    pub(crate) fn backing_of(
        setting: &Setting,
        path: &Path,
        name: &str,
        format: ImageFormat,
    ) -> Result<Self, Failure> {
        let folder = folder_of("image", path)?;
        let allowed = allowed(setting, &folder)?;
        let wanted = lexical_join(&folder, Path::new(name));
        let file = open_backing("--backing", &allowed, &wanted, name, "--image-folder")?;
        let folder = wanted.parent().unwrap_or(Path::new("/")).to_owned();
        let backing = Self {
            path: wanted,
            layers: vec![(format, file)],
            data_file: None,
            read_only: true,
            new: None,
        };
        // The new image is one more.
        backing.with_backing(setting, folder, &allowed, MAX_CHAIN - 1)
    }

    /// Opens what lies below the lowest layer, whose folder is `folder`, to no more than `most` layers in all.
    fn with_backing(
        self,
        setting: &Setting,
        mut folder: PathBuf,
        allowed: &[PathBuf],
        most: usize,
    ) -> Result<Self, Failure> {
        let mut all = self;
        while let Some((ImageFormat::Qcow2, file)) = all.layers.last() {
            let layer = Self {
                path: all.path.clone(),
                layers: vec![(
                    ImageFormat::Qcow2,
                    file.try_clone()
                        .map_err(|e| Failure::host("image: no descriptor").because(&e))?,
                )],
                data_file: None,
                read_only: true,
                new: None,
            };
            let Some(qcow2) = layer.describe(setting)?.info.qcow2 else {
                break;
            };
            let Some(name) = qcow2.backing_file else { break };
            let name = String::from_utf8(name).map_err(|e| {
                let name = String::from_utf8_lossy(e.as_bytes());
                Failure::host(format!(
                    "image: the name of the backing file '{name}' is not UTF-8"
                ))
                .hint(NAME_IT)
            })?;
            if all.layers.len() == most {
                return Err(Failure::host(format!(
                    "image: with what lies below {} a chain has more than {MAX_CHAIN} layers",
                    all.path.display()
                )));
            }
            let format = qcow2.backing_format.as_deref().and_then(ImageFormat::named);
            let format = format.ok_or_else(|| {
                Failure::host(format!(
                    "image: the format of the backing file {name:?} is not named or known"
                ))
                .hint(NAME_IT)
            })?;
            let wanted = lexical_join(&folder, Path::new(&name));
            let file = open_backing("image", allowed, &wanted, &name, "--image-folder")?;
            folder = wanted.parent().unwrap_or(Path::new("/")).to_owned();
            all.layers.push((format, file));
        }
        Ok(all)
    }

    /// Lays this image on `below`: only the tool's `create` has use for it.
    pub(crate) fn on(mut self, below: Self) -> Self {
        self.layers.extend(below.layers);
        self
    }

    /// Gives what [`Self::new_file`] made its name if it was made well; else nothing of it stays.
    pub(crate) fn conclude(&self, made: Result<(), Failure>) -> Result<(), Failure> {
        match &self.new {
            Some(new) => new.conclude(made),
            None => made,
        }
    }

    /// What the image says about itself; nothing is written to it, nor judged as what is to be written to.
    pub(crate) fn describe(&self, setting: &Setting) -> Result<Described, Failure> {
        let mut info = None;
        let mut snapshots = Vec::new();
        let flags = ["--read-only".to_owned()];
        self.run(setting, "info", &flags, None, &mut |message| match message {
            FromImageTool::Info(found) => info = Some(*found),
            FromImageTool::Snapshot(found) if snapshots.len() < MAX_SNAPSHOTS => snapshots.push(found),
            _ => {}
        })?;
        let info = info.ok_or_else(|| Failure::host("the image tool gave no answer"))?;
        Ok(Described { info, snapshots })
    }

    /// Has the jailed tool do `verb`; `target` is a second image, which it writes.
    pub(crate) fn run(
        &self,
        setting: &Setting,
        verb: &str,
        flags: &[String],
        target: Option<&Self>,
        on_message: &mut dyn FnMut(FromImageTool),
    ) -> Result<(), Failure> {
        let failed = |e: &dyn std::error::Error| Failure::host("cannot start the image tool").because(e);
        let null = File::open("/dev/null").map_err(|e| failed(&e))?;
        let (mut words, said) = Words::pipe().map_err(|e| failed(&e))?;
        let (ours, theirs) = pair(SockType::SeqPacket).map_err(|e| failed(&e))?;
        let key = setting.key.as_ref();
        if let Some(key) = key {
            // The one before may have read it.
            lseek(key, 0, Whence::SeekSet).map_err(|e| failed(&e))?;
        }
        let mut fds = vec![null.as_fd(), said.as_fd(), said.as_fd(), theirs.as_fd()];
        let mut arguments = vec![verb.to_owned(), "--control-fd=3".to_owned()];
        for (depth, (format, file)) in self.layers.iter().enumerate() {
            let (number, format) = (fds.len(), format.name());
            fds.push(file.as_fd());
            match depth {
                0 => arguments.extend([format!("--image-fd={number}"), format!("--format={format}")]),
                _ => arguments.push(format!("--backing-fd={format}:{number}")),
            }
        }
        if let Some(file) = &self.data_file {
            arguments.push(format!("--data-file-fd={}", fds.len()));
            fds.push(file.as_fd());
        }
        if let Some((format, file)) = target.and_then(|target| target.layers.first()) {
            arguments.push(format!("--target-fd={}", fds.len()));
            arguments.push(format!("--target-format={}", format.name()));
            fds.push(file.as_fd());
        }
        if let Some(key) = key {
            arguments.push(format!("--key-fd={}", fds.len()));
            fds.push(key.as_fd());
        }
        if self.read_only {
            arguments.push("--read-only".to_owned());
        }
        arguments.push(format!("--seccomp={}", setting.seccomp));
        arguments.extend_from_slice(flags);
        let arguments = [BINARY.to_owned()]
            .into_iter()
            .chain(arguments)
            .map(CString::new)
            .collect::<Result<_, _>>()
            .map_err(|e| Failure::usage("a name with a zero byte").because(&e))?;
        let binary = open_binary()?;
        let proc = open_proc().map_err(|e| failed(&e))?;
        let program = Program {
            binary: binary.as_fd(),
            arguments,
            descriptors: fds,
            proc: proc.as_fd(),
            rooted: false,
            cgroup: None,
            address_space: ADDRESS_SPACE,
            open_files: most_open_files(Role::Image),
            startup: Role::Startup,
            seccomp: setting.seccomp,
            identity: identity::alone().map_err(|e| failed(&e))?,
            parent: Parent::Caller,
        };
        let child = start(&program)
            .and_then(Starting::finish)
            .map_err(|e| failed(&e).hint("bulkhead doctor tells what is missing"))?;
        drop((theirs, said));
        let signals = [Some(self), target]
            .into_iter()
            .flatten()
            .find_map(|opened| opened.new.as_ref())
            .map(|new| &new.signals);
        let outcome = listen(&ours, signals, &mut words, on_message);
        if matches!(outcome, Err(Problem::Signal(_))) {
            let _ = kill(child.pid, Signal::SIGKILL);
        }
        let end = finish(&child, ours);
        words.pass_on(&mut tell_words);
        outcome.map_err(|problem| match problem {
            Problem::Told(why) => Failure::host(format!("{}: {verb}", self.path.display())).cause(why),
            Problem::Lost(why) => lost(&self.path, &why, end),
            Problem::Signal(number) => {
                Failure::host(format!("{}: {verb} was ended by a signal", self.path.display()))
                    .exiting(128_u8.saturating_add(number))
            }
        })
    }
}

/// Where the backing files of an image in `folder` may lie.
fn allowed(setting: &Setting, folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mut allowed = vec![folder.to_owned()];
    for folder in &setting.folders {
        allowed.push(folder.canonicalize().map_err(|e| {
            Failure::host(format!("--image-folder: cannot use {}", folder.display())).because(&e)
        })?);
    }
    Ok(allowed)
}

fn open_binary() -> Result<File, Failure> {
    let path = binary_folder()?.join(BINARY);
    File::open(&path).map_err(|e| {
        Failure::host(format!("cannot open {}", path.display()))
            .because(&e)
            .hint("install all of Bulkhead's binaries in one folder")
    })
}

enum Problem {
    Told(String),
    Lost(String),
    /// Someone wants us to end.
    Signal(u8),
}

/// Reads messages to the last one, or to a signal.
fn listen(
    socket: &OwnedFd,
    signals: Option<&SignalFd>,
    words: &mut Words,
    on_message: &mut dyn FnMut(FromImageTool),
) -> Result<(), Problem> {
    let lost = |e: &dyn std::error::Error| Problem::Lost(crate::tell::chain(e));
    loop {
        if let Some(Ok(Some(info))) = signals.map(SignalFd::read_signal) {
            return Err(Problem::Signal(u8::try_from(info.ssi_signo).unwrap_or(0)));
        }
        match receive_message(socket.as_fd()).map_err(|e| lost(&e))? {
            Received::Message(_, FromImageTool::Done) => return Ok(()),
            Received::Message(_, FromImageTool::Failed(why)) => return Err(Problem::Told(why)),
            Received::Message(_, message) => on_message(message),
            Received::End => return Err(Problem::Lost("it ended without an answer".into())),
            Received::Nothing => {
                words.pass_on(&mut tell_words);
                let all = [Some(socket.as_fd()), signals.map(AsFd::as_fd), words.readable()];
                let all = all.into_iter().flatten();
                let mut ready: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
                let patience = PollTimeout::try_from(PATIENCE_MS).unwrap_or(PollTimeout::MAX);
                match poll(&mut ready, patience) {
                    Ok(0) => return Err(Problem::Lost("it has been silent for ten minutes".into())),
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(e) => return Err(lost(&e)),
                }
            }
        }
    }
}

fn tell_words(line: &str) {
    tell(format_args!("{BINARY}: {line}"));
}

/// What a person is told of a tool that gave no answer, and how it ended, if that is known.
fn lost(path: &Path, why: &str, end: Option<ExitStatus>) -> Failure {
    const SIGSYS: u8 = Signal::SIGSYS as u8;
    let failure = Failure::host(format!("{}: the image tool was lost", path.display()));
    match end {
        None => failure.cause(why),
        // The latter with --seccomp=trap, which has named the call.
        Some(ExitStatus::Signal(SIGSYS) | ExitStatus::Code(exit_code::SECCOMP)) => failure
            .cause("it was stopped by seccomp: policy jailer/policy/image.policy")
            .hint("--seccomp=trap names the call")
            .exiting(exit_code::SECCOMP),
        Some(ExitStatus::Code(EXIT_NO_MEMORY)) => {
            failure.cause("it got no memory: the host, or the bound of its address space, refused it")
        }
        Some(status) => failure.cause(format!("{why}: it {}", describe(status).1)),
    }
}

/// Ends the tool, if it has not ended yet, and reaps it. How it ended, if that was not by us.
fn finish(child: &Child, socket: OwnedFd) -> Option<ExitStatus> {
    let mut ended = [PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN)];
    drop(socket);
    // It has nothing left to do but to exit; if it does not, or was given up, it is killed.
    let by_itself = matches!(poll(&mut ended, PollTimeout::from(2000_u16)), Ok(1));
    if !by_itself {
        let _ = kill(child.pid, Signal::SIGKILL);
    }
    let status = match waitpid(child.pid, None).ok()? {
        WaitStatus::Exited(_, code) => ExitStatus::Code(code as u8),
        WaitStatus::Signaled(_, signal, _) => ExitStatus::Signal(signal as u8),
        _ => return None,
    };
    by_itself.then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_the_tool_ended_is_told() {
        let told = |end| {
            let failure = lost(Path::new("a"), "no answer", end);
            (failure.to_string(), failure.code())
        };
        for (end, words, code) in [
            (None, "cause: no answer", exit_code::ERROR),
            (
                Some(ExitStatus::Signal(31)),
                "image.policy\n  hint: --seccomp=trap",
                exit_code::SECCOMP,
            ),
            (Some(ExitStatus::Code(148)), "by seccomp", exit_code::SECCOMP),
            (Some(ExitStatus::Code(76)), "got no memory", exit_code::ERROR),
            (
                Some(ExitStatus::Signal(9)),
                "no answer: it was killed by signal 9",
                exit_code::ERROR,
            ),
        ] {
            let (text, exit) = told(end);
            assert!(text.contains(words) && exit == code, "{exit}: {text}");
        }
    }
}
