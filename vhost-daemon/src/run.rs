//! From the command line to the exit code.

use crate::device::Errands;
use crate::flags::{self, Connection, Request, Settings};
use crate::listener::Listener;
use crate::memory::Sealing;
use crate::ring::InflightRegion;
use crate::session::{End, ServeError, Session, SessionError, serve};
use crate::signals::{self, Termination};
use crate::worker::{Pulse, STACK_SIZE, Watch, Worker, WorkerError};
use crate::{Device, Program, descriptors, log};
use jailer::sandbox::{
    LockdownError, Locked, Role, SeccompMode, end, end_on_panic, lockdown_main, lockdown_thread,
};
use jailer::tell::{chain, say};
use std::error::Error;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// For a thread to be confined.
const CONFINEMENT_DEADLINE: Duration = Duration::from_secs(60);

/// What ended the process before its time. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The device's files.
    #[error("cannot open the device")]
    Open(#[source] Box<dyn Error + Send + Sync>),
    /// `--fd`.
    #[error("--fd is not a connected vhost-user socket")]
    Fd(#[source] io::Error),
    /// `--socket-path`.
    #[error("cannot listen on {}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Socket activation.
    #[error("LISTEN_FDS: cannot listen on descriptor 3")]
    Activation(#[source] io::Error),
    /// No memfd for the in-flight region.
    #[error("cannot make the in-flight region")]
    Inflight(#[source] io::Error),
    /// Signals could not be prepared.
    #[error("cannot prepare signals")]
    Signals(#[source] io::Error),
    /// A queue's thread.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The device's own thread.
    #[error("cannot start the device's thread")]
    Errands(#[source] io::Error),
    /// The process could not be confined, so it does not serve.
    #[error("cannot confine the process")]
    Lockdown(#[from] LockdownError),
    /// The session.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Runs `P` from its command line to its end.
///
/// Exit codes: 0 when the front end hung up (`--fd`) or a SIGTERM came (before the device is open that ends the
/// process by itself); 1 for an error, printed with
/// its causes; 2 for a wrong command line; 101 for a panic; 135 when the front end truncated guest memory.
pub fn run<P: Program>() -> ExitCode {
    let request = match flags::parse::<P>(std::env::args_os().skip(1)) {
        Ok(request) => request,
        Err(error) => {
            say(format_args!("{}: {error}\nTry '{} --help'.", P::NAME, P::NAME));
            return ExitCode::from(2);
        }
    };
    let (settings, options) = match request {
        Request::Help => return print::<P>(&flags::help::<P>()),
        Request::Version => return print::<P>(&format!("{} {}", P::NAME, env!("CARGO_PKG_VERSION"))),
        Request::PrintCapabilities => return print::<P>(&flags::capabilities::<P>()),
        Request::Serve(settings, options) => (settings, options),
    };
    log::start(settings.log_level, settings.log_format);
    end_on_panic(P::NAME);
    match start::<P>(settings, options) {
        Ok(()) => end(0),
        Err(error) => {
            say(format_args!("{}: {}", P::NAME, chain(&error)));
            end(1)
        }
    }
}

/// A reader that left early is no error.
fn print<P: Program>(text: &str) -> ExitCode {
    let mut out = io::stdout();
    let text = text.trim_end();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            say(format_args!(
                "{}: cannot write to standard output: {error}",
                P::NAME
            ));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// The front end, or where it will come.
enum Front {
    Connected(UnixStream),
    Listening(Listener),
}

/// Opens everything, makes the threads, confines the process, serves.
fn start<P: Program>(settings: Settings, options: P::Options) -> Result<(), DaemonError> {
    if let Some(warning) = settings.seccomp.warning() {
        tracing::warn!(mode = %settings.seccomp, "{warning}");
    }
    signals::outlive_file_limits().map_err(DaemonError::Signals)?;
    signals::end_on_sigbus().map_err(DaemonError::Signals)?;
    let mut device = P::open(options, settings.num_queues).map_err(DaemonError::Open)?;
    // Not before: opening may take long, and whoever asks for the end meanwhile gets it at once.
    let termination = Termination::new().map_err(DaemonError::Signals)?;
    let (front, sealing) = match settings.connection {
        Connection::Fd(number) => {
            let fd = descriptors::inherited(number).map_err(DaemonError::Fd)?;
            (
                Front::Connected(connected(fd).map_err(DaemonError::Fd)?),
                Sealing::Required,
            )
        }
        Connection::Path(path) => match Listener::bind(&path) {
            Ok(listener) => (Front::Listening(listener), Sealing::Preferred),
            Err(source) => return Err(DaemonError::Listen { path, source }),
        },
        Connection::Listening(number) => {
            let fd = descriptors::inherited(number).map_err(DaemonError::Activation)?;
            let listener = Listener::inherited(fd).map_err(DaemonError::Activation)?;
            (Front::Listening(listener), Sealing::Preferred)
        }
    };
    let own_inflight = inflight(device.as_ref(), settings.num_queues).map_err(DaemonError::Inflight)?;
    // They confine themselves while the others are made.
    let own_threads = device.take_errands().into_iter();
    let own_threads =
        own_threads.map(|(name, errands)| OwnThread::spawn(name, errands, P::ROLE, settings.seccomp));
    let own_threads = own_threads.collect::<Result<Vec<_>, _>>()?;
    let workers = Worker::spawn_all(device.as_mut(), P::ROLE, settings.seccomp, settings.patience)?;
    let own_threads = own_threads.into_iter().map(OwnThread::confined);
    let own_threads = own_threads.collect::<Result<Vec<_>, _>>()?;
    let mut session = Session::new(device, workers, sealing, own_inflight);
    session.watch(own_threads);
    let session = Arc::new(Mutex::new(session));
    // Each thread confined itself when it started; the main one is the last.
    let locked = lockdown_main(P::ROLE, settings.seccomp)?;
    let stage = Stage {
        session,
        termination,
        locked,
    };
    stage.play(front)
}

/// What came of a thread's confinement, once that is over.
type Confinement = (Mutex<Option<Result<(), LockdownError>>>, Condvar);

/// A device's own thread, which confines itself before it does anything else.
struct OwnThread {
    name: &'static str,
    confinement: Arc<Confinement>,
    watch: Watch,
}

impl OwnThread {
    fn spawn(
        name: &'static str,
        errands: Errands,
        role: Role,
        mode: SeccompMode,
    ) -> Result<Self, DaemonError> {
        let confinement = Arc::<Confinement>::default();
        let told = Arc::clone(&confinement);
        let pulse = Arc::<Pulse>::default();
        let watch = Watch::new(Arc::clone(&pulse));
        let body = move || {
            pulse.start();
            let locked = lockdown_thread(role, mode);
            let failed = locked.is_err();
            *told.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(locked);
            told.1.notify_all();
            if !failed {
                errands();
            }
        };
        let builder = std::thread::Builder::new().name(name.to_owned());
        builder
            .stack_size(STACK_SIZE)
            .spawn(body)
            .map_err(DaemonError::Errands)?;
        Ok(Self {
            name,
            confinement,
            watch,
        })
    }

    /// Waits until it is confined; its name, and what sees it spin.
    fn confined(self) -> Result<(&'static str, Watch), DaemonError> {
        let (result, changed) = &*self.confinement;
        let result = result.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut result, _) = changed
            .wait_timeout_while(result, CONFINEMENT_DEADLINE, |result| result.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match result.take() {
            Some(result) => result
                .map(|()| (self.name, self.watch))
                .map_err(DaemonError::from),
            None => Err(DaemonError::Errands(io::ErrorKind::TimedOut.into())),
        }
    }
}

/// A socket that is a stream socket of the Unix domain.
fn connected(fd: OwnedFd) -> io::Result<UnixStream> {
    let stream = UnixStream::from(fd);
    stream.peer_addr()?;
    // Reads of a message that has begun wait for the rest of it.
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn inflight(device: &dyn Device, queues: u16) -> io::Result<Option<(InflightRegion, OwnedFd)>> {
    if device.records_inflight() {
        InflightRegion::create(queues, device.max_queue_size()).map(Some)
    } else {
        Ok(None)
    }
}

/// A confined process with its device.
struct Stage {
    session: Arc<Mutex<Session>>,
    termination: Termination,
    locked: Locked,
}

impl Stage {
    fn play(&self, front: Front) -> Result<(), DaemonError> {
        let listener = match front {
            Front::Connected(socket) => return Ok(self.serve(socket).map(drop)?),
            Front::Listening(listener) => listener,
        };
        let next = || listener.accept(&self.termination, &self.session);
        while let Some(socket) = next().map_err(ServeError::Io)? {
            match self.serve(socket) {
                Ok(End::Disconnected) => {}
                Ok(End::Terminated) => return Ok(()),
                // A queue that hangs, or data that cannot be made durable, is not survived.
                Err(error @ ServeError::Session(SessionError::Worker(_) | SessionError::Flush(_))) => {
                    return Err(error.into());
                }
                Err(error) => tracing::error!(error = &error as &dyn Error, "front end dropped"),
            }
        }
        // What orders began between front ends is finished.
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(session.end().map_err(ServeError::from)?)
    }

    fn serve(&self, socket: UnixStream) -> Result<End, ServeError> {
        serve(&self.locked, &self.session, socket, &self.termination)
    }
}
