//! The command line of `bulkhead`.

mod attach;
mod bar;
mod completions;
mod connection;
mod doctor;
mod events;
mod flags;
mod image;
mod inspect;
mod listen;
mod logs;
mod man;
mod metrics;
mod orders;
mod pidfd;
mod policy;
mod ps;
mod spec_file;
mod stop;
#[cfg(test)]
mod tests;
mod upgrade;
mod values;

#[cfg(feature = "fuzzing")]
#[path = "../../fuzz/cli.rs"]
pub(crate) mod fuzz;

use crate::audit::catalogue::Attack;
use crate::audit::wall::Wall;
use crate::audit::{self, AUDITED};
use crate::clock::monotonic_ns;
use crate::failure::Failure;
use crate::inherit;
use crate::launch::net::link::{self, Order};
use crate::launch::{self, Jail, Options};
use crate::sandbox::{Role, SeccompMode};
use crate::tell::{say, speak_json};
use bar::Bar;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;
use values::any_of;
use vm_spec::control::exit_code::USAGE;
use vm_spec::size::ByteSize;
use vm_spec::spec::VmSpec;

/// Runs microVMs whose parts are separate, jailed processes.
#[derive(Parser, Debug)]
#[command(name = "bulkhead", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// [`Cli`] for someone who types `run`: building every other verb's arguments takes longer than all
/// else that happens before the vmm is started.
#[derive(Parser, Debug)]
#[command(name = "bulkhead", version, max_term_width = 100)]
struct RunCli {
    #[command(subcommand)]
    verb: RunVerb,
}

#[derive(Subcommand, Debug)]
enum RunVerb {
    /// Run a VM to its end, with its console on this terminal (Ctrl-A x ends it)
    Run(Box<RunArgs>),
}

#[derive(Subcommand, Debug)]
enum Verb {
    /// Run a VM to its end, with its console on this terminal (Ctrl-A x ends it)
    Run(Box<RunArgs>),
    /// List your running VMs: name, the pid of bulkhead run, since when, device processes
    Ps {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Say all that is known of a running VM: its processes, their ids, and what each holds open
    Inspect {
        /// The VM's name
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Join a running VM's console (Ctrl-A x leaves it, and the VM runs on)
    Console {
        /// The VM's name
        vm: String,
    },
    /// Print what a running VM's processes logged last
    Logs {
        /// The VM's name
        vm: String,
        /// Go on until the VM is over
        #[arg(long, short)]
        follow: bool,
        /// Print JSON, one object a line, as bulkhead run --log-format json does: process, timestamp, level, message
        #[arg(long)]
        json: bool,
    },
    /// Ask a VM's guest to power off, and wait until the VM is over; asked again half a
    /// second later or more, the VM is killed
    Stop {
        /// The VM's name
        vm: String,
        /// How long to wait, in seconds (then exit code 8); the guest has what power-off-grace says
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u32,
    },
    /// Kill a VM, and wait until nothing of it is left
    Kill {
        /// The VM's name
        vm: String,
    },
    /// Say what happened to a running VM's devices, one JSON object a line
    Events {
        /// The VM's name
        vm: String,
        /// Go on until the VM is over
        #[arg(long, short)]
        follow: bool,
    },
    /// Take a NIC's link down or up while the VM runs
    Link {
        /// The VM's name
        vm: String,
        /// The NIC's id, such as net0
        nic: String,
        /// What to do
        order: Order,
    },
    /// Make a running VM's disk longer, which its guest is told at once (raw and qcow2 images)
    Resize {
        /// The VM's name
        vm: String,
        /// The disk's id, such as disk0
        disk: String,
        /// The new size, such as 20G
        size: ByteSize,
    },
    /// Attach a device to a running VM that was started with slots for it (hotplug)
    Attach {
        /// The VM's name
        vm: String,
        #[command(flatten)]
        device: flags::DeviceFlags,
    },
    /// Have a running VM's guest let go of a device, and end its process
    Detach {
        /// The VM's name
        vm: String,
        /// The device's id, such as disk1
        device: String,
    },
    /// Print what a running VM's device processes count, in Prometheus' text format
    Metrics {
        /// The VM's name
        vm: String,
        /// Only this disk or NIC, such as disk0
        device: Option<String>,
    },
    /// Replace a running VM's device processes by another build, while its guest works
    Upgrade {
        /// The VM's name
        vm: String,
        /// The device (default: all that the binary's name says it is for)
        device: Option<String>,
        /// The new build
        #[arg(long, value_name = "FILE")]
        binary: PathBuf,
    },
    /// Say what this host lacks, and the command that mends it
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Attack each jail of a VM from inside, and say which wall held
    Audit {
        #[arg(long, value_name = "WALL", help = without_help(), value_parser = values::wall(), hide_possible_values = true)]
        without: Option<Wall>,
        #[arg(long, help = audited_help(), value_parser = values::audited(), hide_possible_values = true)]
        role: Option<Role>,
        /// Only this attack, by its name in the report
        #[arg(long, value_name = "NAME", value_parser = values::attack(), hide_possible_values = true)]
        attack: Option<&'static Attack>,
        /// The folder with the probes (default: probes, beside this program)
        #[arg(long, value_name = "FOLDER")]
        probes: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Look at, make and change disk images, in a jail
    Image {
        #[command(subcommand)]
        verb: image::ImageVerb,
    },
    /// Look at the system call policies
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
    /// Print the manual page, or that of a verb, for man -l
    Man {
        /// The verb, such as run or image info
        verb: Vec<String>,
    },
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Subcommand, Debug)]
enum PolicyVerb {
    /// Print every rule of a role, with its reason
    Show {
        #[arg(help = any_of(&Role::ALL.map(Role::name)), value_parser = values::role(), hide_possible_values = true)]
        role: Role,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

fn without_help() -> String {
    let walls = any_of(&Wall::ALL.map(Wall::name));
    format!("Take one wall away, and show that the next one holds: {walls}")
}

fn audited_help() -> String {
    format!("Only this role: {}", any_of(&AUDITED.map(Role::name)))
}

/// `bulkhead run`'s arguments.
#[derive(Args, Debug)]
struct RunArgs {
    /// The VM, as a TOML file, or JSON where its name ends in .json, or - for standard input; flags override and
    /// add to it. Its paths are relative to it, those of flags and of - to the current folder
    spec: Option<PathBuf>,
    #[command(flatten)]
    vm: flags::VmFlags,
    /// Print the JSON schema of specs, for editors and programs, and run nothing
    #[arg(long)]
    print_schema: bool,
    /// Print the processes, descriptors and policies that would run, and run nothing
    #[arg(long)]
    dry_run: bool,
    /// What becomes of a system call that no policy allows: enforce, trap, log or off
    #[arg(long, value_name = "MODE", default_value_t = SeccompMode::Enforce, value_parser = values::seccomp(),
        hide_possible_values = true)]
    seccomp: SeccompMode,
    /// Whether processes have namespaces, limits and filters: off is for finding faults only
    #[arg(long, value_enum, value_name = "WHETHER", default_value_t = Jail::On)]
    jail: Jail,
    /// How much every process logs
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Warn)]
    log_level: LogLevel,
    /// Log more (-v info, -vv debug, -vvv trace)
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// How log lines look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Human)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, ValueEnum)]
enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum LogFormat {
    Human,
    Json,
}

impl RunArgs {
    fn spec(&self) -> Result<VmSpec, Failure> {
        match &self.spec {
            Some(path) => self.vm.over(spec_file::read(path)?),
            None => self.vm.alone(),
        }
    }

    fn options(&self) -> Options {
        let raised = match self.verbose {
            0 => LogLevel::Error,
            1 => LogLevel::Info,
            2 => LogLevel::Debug,
            _ => LogLevel::Trace,
        };
        Options {
            jail: self.jail,
            seccomp: self.seccomp,
            log_level: format!("{:?}", self.log_level.max(raised)).to_lowercase(),
            log_json: self.log_format == LogFormat::Json,
        }
    }
}

/// Runs the command line and returns the exit code.
pub fn main() -> u8 {
    let launched_ns = monotonic_ns();
    inherit::hear_of_children();
    // A file that may grow no further (RLIMIT_FSIZE), such as a log, is an error of the write, and ends no VM.
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
    // A capability of the file (setcap) makes what is in /proc about us root's, and namespaces want it.
    if prctl::get_dumpable() == Ok(false) {
        let _ = prctl::set_dumpable(true);
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let usage = image::usage_code(&arguments);
    let of = |code| if code == USAGE { usage } else { code };
    let verb = match parse(arguments) {
        Ok(verb) => verb,
        Err(error) => {
            // Help and version are no errors, and clap knows where each goes.
            let _ = error.print();
            return of(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    if matches!(&verb, Verb::Run(run) if run.log_format == LogFormat::Json) {
        speak_json();
    }
    match carry_out(verb, launched_ns) {
        Ok(code) => code,
        Err(failure) => {
            say(format_args!("{failure}"));
            of(failure.code())
        }
    }
}

fn parse(arguments: Vec<OsString>) -> Result<Verb, clap::Error> {
    if arguments.get(1).is_some_and(|verb| verb == "run") {
        let RunVerb::Run(run) = RunCli::try_parse_from(arguments)?.verb;
        Ok(Verb::Run(run))
    } else {
        Ok(Cli::try_parse_from(arguments)?.verb)
    }
}

fn carry_out(verb: Verb, launched_ns: u64) -> Result<u8, Failure> {
    match verb {
        Verb::Run(args) if args.print_schema => print(vm_spec::schema::SCHEMA),
        Verb::Run(args) if args.dry_run => print(&launch::dry_run(&args.spec()?, &args.options())?),
        Verb::Run(args) => launch::run(&args.spec()?, &args.options(), launched_ns),
        Verb::Ps { json } => print(&ps::show(json)?),
        Verb::Inspect { vm, json } => print(&inspect::show(&vm, json)?),
        Verb::Console { vm } => listen::console(&vm),
        Verb::Logs { vm, follow, json } => logs::print(&vm, follow, json),
        Verb::Stop { vm, timeout } => {
            let (text, code) = stop::stop(&vm, Duration::from_secs(timeout.into()))?;
            print(&text)?;
            Ok(code)
        }
        Verb::Kill { vm } => print(&stop::kill(&vm)?),
        Verb::Events { vm, follow } => events::show(&vm, follow),
        Verb::Link { vm, nic, order } => {
            // A pipe of a VM that is over takes orders as well.
            let running = ps::find(&vm)?;
            link::order(&vm, &running.folder, &nic, order)
        }
        Verb::Resize { vm, disk, size } => print(&orders::resize(&vm, &disk, size)?),
        Verb::Metrics { vm, device } => metrics::show(&vm, device.as_deref()),
        Verb::Attach { vm, device } => print(&attach::attach(&vm, &device)?),
        Verb::Detach { vm, device } => print(&attach::detach(&vm, &device)?),
        Verb::Upgrade { vm, device, binary } => upgrade::upgrade(&vm, device.as_deref(), &binary),
        Verb::Doctor { json } => {
            let (text, code) = doctor::examine(json);
            print(&text)?;
            Ok(code)
        }
        Verb::Audit {
            without,
            role,
            attack,
            probes,
            json,
        } => {
            let options = audit::Options {
                without,
                role,
                attack,
                probes,
                json,
            };
            let bar = Bar::new("{pos}/{len} attempts {eta}");
            let audited = audit::run(&options, &|done, total| bar.show(done, total));
            drop(bar);
            let (text, code) = audited?;
            print(&text)?;
            Ok(code)
        }
        Verb::Image { verb } => {
            let (text, code) = image::carry_out(&verb)?;
            print(&text)?;
            Ok(code)
        }
        Verb::Policy {
            verb: PolicyVerb::Show { role, json },
        } => print(&policy::show(role, json)),
        Verb::Man { verb } => print(&man::page(Cli::command(), &verb)?),
        Verb::Completions { shell } => print(&completions::script(Cli::command(), shell)),
    }
}

/// Data goes to standard output; a reader that left early is no error.
fn print(text: &str) -> Result<u8, Failure> {
    put_out(text.as_bytes()).map(|_| 0)
}

/// Writes to standard output at once; false: nobody reads it any more.
fn put_out(bytes: &[u8]) -> Result<bool, Failure> {
    let mut out = std::io::stdout();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Failure::host("cannot write to standard output").because(&e)),
    }
}
