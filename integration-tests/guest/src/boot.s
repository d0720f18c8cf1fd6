    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .quad pvh_start

    .section .text.boot, "ax"
    .code32
    .global pvh_start
pvh_start:
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x20, %eax                /* PAE */
    movl %eax, %cr4
    movl $0xC0000080, %ecx          /* EFER: long mode */
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000011, %eax          /* paging, extension type, protected mode */
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x08, $long_mode

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movq $kernel_stack_top, %rsp

    movq $tss, %rax                 /* the TSS descriptor's base */
    movw %ax, gdt_tss + 2
    shrl $16, %eax
    movb %al, gdt_tss + 4
    movb %ah, gdt_tss + 7
    movl $0x28, %eax
    ltr %ax

    movl $stubs, %eax               /* one gate a stub, 16 bytes apart */
    movl $idt, %edi
    movl $64, %ecx
1:  movw %ax, (%rdi)
    movl %eax, %edx
    shrl $16, %edx
    movw %dx, 6(%rdi)
    addl $16, %eax
    addl $16, %edi
    decl %ecx
    jnz 1b
    lidt idt_pointer

    movl $0xFEE00000, %eax          /* local APIC: PIC's line masked, enabled, spurious 3F */
    movl $0x10000, 0x350(%rax)
    movl $0x13F, 0xF0(%rax)

    pushq $0x1B
    pushq $user_stack_top
    pushq $0x202                    /* interrupts on */
    pushq $0x23
    pushq $user
    iretq

/* Ring 3. Only here is work cheap. */
user:
    movl %ebx, %esi
    movq $bss_start, %rdi
    movq $bss_end, %rcx
    subq %rdi, %rcx
    xorl %eax, %eax
    rep stosb
    movl %esi, %edi
    xorl %ebp, %ebp
    call user_main
    ud2

/* hlt in ring 3 is a general protection fault; here it waits until *rdi differs from rsi. The
   comparison and the halt are one step to interrupts, so that none is slept through. */
protection:
    pushq %rax
    movq 16(%rsp), %rax
    cmpb $0xF4, (%rax)
    jne 3f
    incq 16(%rsp)
1:  cmpq %rsi, (%rdi)
    jne 2f
    sti
    hlt
    cli
    jmp 1b
2:  popq %rax
    addq $8, %rsp
    iretq
3:  popq %rax
    pushq $13
    jmp fatal

    .balign 16
stubs:
    .set number, 0
    .rept 48
    .balign 16
    .if number == 13
    jmp protection
    .else
    pushq $number
    jmp fatal
    .endif
    .set number, number + 1
    .endr
    .rept 15
    .balign 16
    pushq $(number - 48)
    jmp count
    .set number, number + 1
    .endr
    .balign 16
    iretq                           /* spurious: no end of interrupt */
fatal:
    cld
    popq %rdi
    movq %rsp, %rsi
    andq $-16, %rsp
    call exception
    ud2
count:
    pushq %rax
    movq 8(%rsp), %rax
    incq vector_counts(,%rax,8)
    incq interrupt_count
    movl $0xFEE000B0, %eax
    movl $0, (%rax)
    popq %rax
    addq $8, %rsp
    iretq

    .section .data.boot, "aw"
    .global interrupt_count, vector_counts, idt
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .set page, 0
    .rept 2048
    .quad page + 0xE7               /* present, writable, user, accessed, dirty, 2 MiB */
    .set page, page + 0x200000
    .endr
idt:
    .rept 64
    .quad 0x00008E0000080000, 0
    .endr
gdt:
    .quad 0
    .quad 0x00209B0000000000
    .quad 0x0000930000000000
    .quad 0x0000F30000000000
    .quad 0x0020FB0000000000
gdt_tss:
    .quad 0x0000890000002068, 0
gdt_end:
tss:
    .long 0
    .quad kernel_stack_top
    .fill 90, 1, 0
    .word 104
    .fill 8192, 1, 0                /* every port open to ring 3 */
    .byte 0xFF
interrupt_count:
    .quad 0
vector_counts:
    .fill 15, 8, 0
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 1023
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0
    .text
