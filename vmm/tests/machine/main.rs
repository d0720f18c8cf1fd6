//! The vmm with kernels of a few instructions on this host's KVM, with its filters enforced.

mod backend;
mod guest;
mod process;

use guest::Code;
use libtest_mimic::{Arguments, Failed, Trial};
use nix::sys::socket::{MsgFlags, recv};
use process::{Guest, SLOT, Vmm};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vm_spec::control::{EndReason, FromVmm, ToVmm};
use vm_spec::machine;

type Outcome = Result<(), Failed>;
type Test = (&'static str, fn() -> Outcome);

fn main() {
    let arguments = Arguments::from_args();
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    let tests: [Test; 24] = [
        ("a_byte_and_a_power_off", a_byte_and_a_power_off),
        ("more_memory_than_the_hole_and_many_vcpus", more_memory_and_vcpus),
        ("no_pic_interrupts_who_never_masked_it", pics),
        ("no_pin_of_the_io_apic_stays_open_across_a_reboot", io_apic),
        ("each_end_is_told_apart", each_end_is_told_apart),
        ("a_commands_exit_status", exit_status),
        ("a_reset_before_anything_is_no_success", instant_reset),
        ("twenty_reboots_in_one_process", twenty_reboots),
        (
            "a_reboot_waits_for_the_end_of_a_lost_back_end",
            reboot_with_a_loss,
        ),
        (
            "a_reboot_forgets_the_memory_types_of_the_last_guest",
            memory_types,
        ),
        (
            "a_device_for_which_there_are_no_descriptors_is_refused",
            no_descriptors,
        ),
        ("a_reset_ends_the_vm_where_so_asked", reset_ends),
        ("the_power_button_reaches_the_guest", power_button),
        ("an_event_before_its_driver_is_told_again", early_event),
        ("input_reaches_the_guest", input),
        ("closed_input_keeps_nobody_busy", closed_input),
        ("output_that_nobody_reads_keeps_nobody_busy", unread_output),
        ("stop_ends_a_spinning_guest", stop),
        ("a_supervisor_that_goes_takes_the_vm_along", abandoned),
        ("exits_are_counted_by_reason", exits),
        ("what_is_no_kernel_is_refused", no_kernel),
        ("a_truncated_kernel_is_refused", truncated_kernel),
        (
            "a_kernel_that_is_truncated_before_a_reboot_is_named",
            overwritten_kernel,
        ),
        ("too_large_an_initrd_or_too_little_memory_is_refused", too_large),
    ];
    let trials = tests
        .into_iter()
        .map(|(name, test)| match &kvm {
            Ok(_) => Trial::test(name, test),
            Err(error) => {
                let reason = format!("cannot open /dev/kvm: {error}");
                Trial::test(name, move || Err(reason.into())).with_ignored_flag(true)
            }
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}

/// Runs a guest to its end: its output, how it ended, how often it rebooted.
fn run(guest: Guest) -> (String, EndReason, usize) {
    let mut vmm = Vmm::start(guest);
    vmm.running();
    let (reason, reboots) = vmm.ended();
    let output = vmm.output();
    assert!(vmm.exit().success());
    (output, reason, reboots)
}

fn a_byte_and_a_power_off() -> Outcome {
    let kernel = Code::default().print("A").power_off().spin().elf();
    assert_eq!(run(Guest::new(&kernel)), ("A".into(), EndReason::PowerOff, 0));
    Ok(())
}

fn more_memory_and_vcpus() -> Outcome {
    let kernel = Code::default().print("A").power_off().spin().elf();
    let guest = Guest {
        memory: 5 << 30,
        cpus: 32,
        cmdline: "x".repeat(2047),
        initrd: Some(guest::file(&[7; 5000])),
        ..Guest::new(&kernel)
    };
    assert_eq!(run(guest), ("A".into(), EndReason::PowerOff, 0));
    Ok(())
}

/// No pin of either PIC is open, at the first boot and after a reboot.
fn pics() -> Outcome {
    let kernel = Code::default()
        .print_clear_bits(0x21)
        .print_clear_bits(0xA1)
        .reset_until(2)
        .power_off()
        .spin()
        .elf();
    assert_eq!(run(Guest::new(&kernel)), ("\0".repeat(4), EndReason::PowerOff, 1));
    Ok(())
}

/// The event device's pin and the console's are masked and nothing more at each boot, though the guest opens them.
fn io_apic() -> Outcome {
    let pins = [machine::GED_GSI, machine::COM1_GSI].map(guest::redirection);
    let print = |code: Code, pin| code.print_ioapic(pin);
    let open = |code: Code, pin| code.set_ioapic(pin, 0x30);
    let code = pins.into_iter().fold(Code::default(), print);
    let code = pins.into_iter().fold(code, open).reset_until(2);
    let kernel = code.power_off().spin().elf();
    let masked = String::from_utf8(0x1_0000u32.to_le_bytes().repeat(4))?;
    assert_eq!(run(Guest::new(&kernel)), (masked, EndReason::PowerOff, 1));
    Ok(())
}

fn each_end_is_told_apart() -> Outcome {
    for (code, reason) in [
        (Code::default().print("x").triple_fault(), EndReason::TripleFault),
        (Code::default().print("x").out(0x505, 1).spin(), EndReason::Panic),
    ] {
        assert_eq!(run(Guest::new(&code.elf())).1, reason);
    }
    Ok(())
}

fn exit_status() -> Outcome {
    // By the enhanced configuration space, and by ports.
    let status = Code::default().store(0xE000_0044, &[42]).power_off().spin();
    let by_ports = Code::default().out_long(0xCF8, 0x8000_0044).out(0xCFC, 0);
    let by_ports = by_ports.power_off().spin();
    let no_status = Code::default().power_off().spin();
    for (code, takes_status, reason) in [
        (&status, true, EndReason::Exited(42)),
        (&status, false, EndReason::PowerOff),
        (&by_ports, true, EndReason::Exited(0)),
        (&no_status, true, EndReason::NoStatus),
    ] {
        let guest = Guest {
            takes_status,
            ..Guest::new(&code.clone().elf())
        };
        assert_eq!(run(guest).1, reason);
    }
    Ok(())
}

fn instant_reset() -> Outcome {
    for code in [
        Code::default().out(0x602, 1).spin(),
        Code::default().out(0xCF9, 6).spin(),
        Code::default().out(0x64, 0xFE).spin(),
        Code::default().triple_fault(),
    ] {
        let (output, reason, reboots) = run(Guest::new(&code.elf()));
        assert_eq!(
            (output.as_str(), reason, reboots),
            ("", EndReason::InstantReset, 0)
        );
    }
    Ok(())
}

fn twenty_reboots() -> Outcome {
    let kernel = Code::default()
        .print("b\n")
        .reset_until(21)
        .power_off()
        .spin()
        .elf();
    let guest = Guest {
        cpus: 2,
        ..Guest::new(&kernel)
    };
    assert_eq!(run(guest), ("b\n".repeat(21), EndReason::PowerOff, 20));
    Ok(())
}

fn memory_types() -> Outcome {
    let kernel = Code::default()
        .print_and_set_msr(0x200, 6) // variable MTRR: write-back
        .print_and_set_msr(0x250, 0x0606_0606) // fixed MTRRs
        .print_and_set_msr(0x26F, 0x0606_0606)
        .reset_until(2)
        .power_off()
        .spin()
        .elf();
    assert_eq!(run(Guest::new(&kernel)), ("\0".repeat(6), EndReason::PowerOff, 1));
    Ok(())
}

fn reboot_with_a_loss() -> Outcome {
    let kernel = Code::default()
        .print("b")
        .drive(SLOT)
        .reset_until(2)
        .wait_for_event()
        .power_off()
        .spin()
        .elf();
    let (disk, socket) = UnixStream::pair()?;
    backend::start(disk, true);
    let mut vmm = Vmm::start(Guest {
        disk: Some(socket),
        ..Guest::new(&kernel)
    });
    vmm.running();
    let lost = vmm.event();
    assert!(matches!(lost, FromVmm::BackendLost { .. }), "{lost:?}");
    // The supervisor is heard, and the reset not done; it would be in a few milliseconds.
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        vmm.tell(ToVmm::Stats);
        let next = vmm.event();
        assert!(matches!(next, FromVmm::Stats(_)), "{next:?}");
    }
    let (disk, socket) = UnixStream::pair()?;
    backend::start(disk, false);
    let id = vmm.replace_disk(&socket);
    drop(socket);
    let mut answers = [vmm.receive(), vmm.receive()];
    answers.sort_by_key(|answer| answer.id);
    assert_eq!(answers[0].body, FromVmm::Rebooted);
    assert_eq!((answers[1].id, &answers[1].body), (id, &FromVmm::Done));
    assert_eq!(vmm.ask(ToVmm::PowerButton), FromVmm::Done);
    assert_eq!(vmm.ended(), (EndReason::PowerOff, 0));
    assert_eq!(vmm.output(), "bb");
    assert!(vmm.exit().success());
    Ok(())
}

/// Whatever it is that cannot be made, the guest runs on, and the slot stays.
fn no_descriptors() -> Outcome {
    let kernel = until_an_event();
    let mut vmm = Vmm::start(Guest {
        spare: true,
        ..Guest::new(&kernel)
    });
    vmm.running();
    let mut refused = Vec::new();
    // Fewer than are polled at once, the kernel would not poll.
    for most in 8..200 {
        vmm.limit_descriptors(most);
        let (disk, socket) = UnixStream::pair()?;
        backend::start(disk, false);
        match vmm.attach_disk(&socket) {
            FromVmm::Failed(why) => refused.push(why),
            FromVmm::Done => {
                let reasons = ["no room for them", "cannot make an eventfd"];
                let known = |why: &String| reasons.iter().any(|reason| why.contains(reason));
                assert!(refused.len() > 6 && refused.iter().all(known), "{refused:?}");
                // It told the guest, which has ended.
                assert_eq!(vmm.ended().0, EndReason::PowerOff);
                assert!(vmm.exit().success());
                return Ok(());
            }
            other => return Err(format!("{other:?}").into()),
        }
    }
    Err(format!("never attached: {refused:?}").into())
}

fn reset_ends() -> Outcome {
    let kernel = Code::default().print("b").out(0x602, 1).spin().elf();
    let guest = Guest {
        restart_on_reboot: false,
        ..Guest::new(&kernel)
    };
    assert_eq!(run(guest), ("b".into(), EndReason::Reset, 0));
    Ok(())
}

/// A kernel that powers off once it is told of an event.
fn until_an_event() -> Vec<u8> {
    Code::default()
        .print("r")
        .wait_for_event()
        .power_off()
        .spin()
        .elf()
}

fn power_button() -> Outcome {
    let kernel = until_an_event();
    let mut vmm = Vmm::start(Guest::new(&kernel));
    vmm.running();
    assert_eq!(vmm.ask(ToVmm::PowerButton), FromVmm::Done);
    assert_eq!(vmm.ended().0, EndReason::PowerOff);
    assert!(vmm.exit().success());
    Ok(())
}

fn early_event() -> Outcome {
    let kernel = Code::default().print("r").echo().fall_at_the_next_event().elf();
    let mut vmm = Vmm::start(Guest::new(&kernel));
    vmm.running();
    vmm.console.read_exact(&mut [0])?;
    assert_eq!(vmm.ask(ToVmm::PowerButton), FromVmm::Done);
    // KVM's worker brings the interrupt, and drops it.
    let_it_spin(&vmm);
    vmm.console.write_all(b"x")?;
    assert_eq!(vmm.ended().0, EndReason::TripleFault);
    assert!(vmm.exit().success());
    Ok(())
}

fn input() -> Outcome {
    let kernel = Code::default().echo().echo().echo().power_off().spin().elf();
    let mut vmm = Vmm::start(Guest::new(&kernel));
    vmm.running();
    vmm.console.write_all(b"abc")?;
    assert_eq!(vmm.ended().0, EndReason::PowerOff);
    assert_eq!(vmm.output(), "abc");
    Ok(())
}

fn closed_input() -> Outcome {
    let kernel = Code::default().wait_for_event().echo().echo().spin().elf();
    let mut vmm = Vmm::start(Guest::new(&kernel));
    vmm.running();
    vmm.console.write_all(b"ab")?;
    vmm.console.shutdown(Shutdown::Write)?;
    // Each answer comes after one more look at the console: two bytes, then the end.
    for _ in 0..3 {
        vmm.ask(ToVmm::Stats);
    }
    assert_eq!(vmm.ask(ToVmm::PowerButton), FromVmm::Done);
    vmm.console.read_exact(&mut [0; 2])?;
    let before = vmm.ticks("bulkhead-vmm");
    let_it_spin(&vmm);
    let busy = vmm.ticks("bulkhead-vmm") - before;
    assert!(busy < 5, "{busy} ticks of the main thread");
    assert!(vmm.abandon().success());
    Ok(())
}

/// Waits until the guest had 0.3 s of processor time.
fn let_it_spin(vmm: &Vmm) {
    let enough = vmm.ticks("vcpu-0") + 30;
    let deadline = Instant::now() + Duration::from_secs(20);
    while vmm.ticks("vcpu-0") < enough {
        assert!(Instant::now() < deadline, "the guest does not spin");
        std::thread::yield_now();
    }
}

fn unread_output() -> Outcome {
    let kernel = Code::default().print_memory(1 << 20).spin().elf();
    let mut vmm = Vmm::start(Guest::new(&kernel));
    vmm.running();
    let dropped = |vmm: &mut Vmm| match vmm.ask(ToVmm::Stats) {
        FromVmm::Stats(stats) => stats.console_dropped,
        other => panic!("no statistics: {other:?}"),
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while dropped(&mut vmm) == 0 {
        assert!(Instant::now() < deadline, "the console takes it all");
        std::thread::yield_now();
    }
    let before = vmm.sleeps();
    let_it_spin(&vmm);
    let sleeps = vmm.sleeps() - before;
    assert!(sleeps < 10, "the main thread woke {sleeps} times");
    // Who reads again is given more than what waited in the socket.
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let mut text = vec![0; 1 << 20];
    let in_socket = recv(vmm.console.as_raw_fd(), &mut text, flags)?;
    vmm.console.read_exact(&mut text[..=in_socket])?;
    assert!(vmm.abandon().success());
    Ok(())
}

fn stop() -> Outcome {
    let mut vmm = Vmm::start(Guest {
        cpus: 4,
        ..Guest::new(&Code::default().print("s").spin().elf())
    });
    vmm.running();
    vmm.console.read_exact(&mut [0])?;
    vmm.tell(ToVmm::Stop);
    assert_eq!(vmm.ended().0, EndReason::Stopped);
    assert!(vmm.exit().success());
    Ok(())
}

fn abandoned() -> Outcome {
    let mut vmm = Vmm::start(Guest::new(&Code::default().print("s").spin().elf()));
    vmm.running();
    vmm.console.read_exact(&mut [0])?;
    assert!(vmm.abandon().success());
    Ok(())
}

fn exits() -> Outcome {
    let mut vmm = Vmm::start(Guest::new(&Code::default().print("0123456789").spin().elf()));
    vmm.running();
    vmm.console.read_exact(&mut [0; 10])?;
    let FromVmm::Stats(stats) = vmm.ask(ToVmm::Stats) else {
        return Err("no statistics".into());
    };
    assert!(stats.exits.contains(&("io_out".into(), 10)), "{:?}", stats.exits);
    assert_eq!(stats.console_dropped, 0);
    assert!(vmm.abandon().success());
    Ok(())
}

/// The three lines of a refusal.
fn refusal(guest: Guest) -> (String, String, String) {
    let vmm = Vmm::start(guest);
    let FromVmm::Error { what, cause, hint } = vmm.event() else {
        panic!("it started");
    };
    assert!(!vmm.exit().success());
    (what, cause, hint)
}

fn no_kernel() -> Outcome {
    let (what, _, hint) = refusal(Guest::new(&[0; 8192]));
    assert_eq!(
        what,
        "boot.kernel: the kernel is neither an ELF file nor a bzImage"
    );
    assert!(hint.contains("vmlinux"));
    let mut elf = Code::default().spin().elf();
    elf[0x108] = 0;
    let (what, _, hint) = refusal(Guest::new(&elf));
    assert!(what.contains("PVH"), "{what}");
    assert!(hint.contains("CONFIG_PVH"));
    Ok(())
}

fn truncated_kernel() -> Outcome {
    let kernel = Code::default().print("a long kernel").power_off().spin().elf();
    for length in [0, 3, 63, 100, 0x108, kernel.len() - 1] {
        let (what, _, hint) = refusal(Guest::new(&kernel[..length]));
        assert!(what.contains("the kernel is truncated"), "{length}: {what}");
        assert!(hint.contains("incomplete"));
    }
    Ok(())
}

fn overwritten_kernel() -> Outcome {
    let kernel = Code::default().print("b").echo().out(0x602, 1).spin().elf();
    let guest = Guest::new(&kernel);
    let file = guest.kernel.try_clone()?;
    let mut vmm = Vmm::start(guest);
    vmm.running();
    file.set_len(100)?;
    vmm.console.write_all(b"x")?;
    let FromVmm::Error { what, cause, .. } = vmm.event() else {
        return Err("it went on".into());
    };
    assert_eq!(what, "boot.kernel: cannot read the kernel");
    assert!(!cause.is_empty());
    assert!(!vmm.exit().success());
    Ok(())
}

fn too_large() -> Outcome {
    let kernel = Code::default().power_off().spin().elf();
    let initrd = guest::file(&[]);
    initrd.set_len(32 << 20)?;
    let (what, _, hint) = refusal(Guest {
        initrd: Some(initrd),
        ..Guest::new(&kernel)
    });
    assert!(what.contains("initrd is 33554432 bytes"), "{what}");
    assert!(hint.contains("more memory"));
    let mut large = kernel;
    large[64 + 40..64 + 48].copy_from_slice(&(64u64 << 20).to_le_bytes());
    let (what, ..) = refusal(Guest::new(&large));
    assert!(what.contains("needs guest memory up to"), "{what}");
    Ok(())
}
