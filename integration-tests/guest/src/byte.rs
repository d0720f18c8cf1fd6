//! The smallest guest: its first instructions write one byte to COM1, its last power off.
//!
//! Entered by PVH (32-bit protected mode, paging off) and stays there: what is measured with it
//! is the launch alone.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "the whole guest is its PVH entry")
)]

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("tiny-byte is a guest: build it for x86_64-unknown-none");
}

#[cfg(target_os = "none")]
core::arch::global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18              /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad pvh_start
    .section .text.boot, "ax"
    .code32
    .global pvh_start
pvh_start:
    movw ${com1}, %dx
    movb $0x42, %al
    outb %al, %dx
    movw ${sleep}, %dx
    movb ${s5}, %al
    outb %al, %dx
1:  hlt
    jmp 1b
    .code64
"#,
    com1 = const guest_contract::machine::COM1,
    sleep = const guest_contract::machine::SLEEP_CONTROL,
    s5 = const guest_contract::machine::SLEEP_S5,
    options(att_syntax)
);

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
