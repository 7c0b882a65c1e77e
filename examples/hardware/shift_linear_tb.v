// Loads one exported shift layer and its vectors, runs every token through the hardware, and compares every bit of every output.
`timescale 1ns / 1ns

module shift_linear_tb #(
    parameter TOKENS = 1, IN = 1, OUT = 1, X_BITS = 8, CODE_BITS = 5, ACC_BITS = 32, BIAS_BITS = 32, SHIFT_BITS = 8, Y_BITS = 16
);
    reg signed [X_BITS-1:0] x_mem[0:TOKENS*IN-1];
    reg [CODE_BITS-1:0] code_mem[0:OUT*IN-1];
    reg signed [BIAS_BITS-1:0] bias_mem[0:OUT-1];
    reg signed [SHIFT_BITS-1:0] shift_mem[0:OUT-1];
    reg signed [Y_BITS-1:0] y_mem[0:TOKENS*OUT-1];

    reg clk = 0, load = 0;
    reg signed [ACC_BITS-1:0] bias;
    reg signed [X_BITS-1:0] x = 0;
    reg [CODE_BITS-1:0] code = 0;
    reg signed [SHIFT_BITS-1:0] shift = 0;
    wire signed [ACC_BITS-1:0] acc;
    wire signed [Y_BITS-1:0] y;
    integer token, row, column, wrong;
    reg [8*1024-1:0] file;

    shift_accumulate #(.X_BITS(X_BITS), .CODE_BITS(CODE_BITS), .ACC_BITS(ACC_BITS)) sums (clk, load, bias, x, code, acc);
    rescale #(.ACC_BITS(ACC_BITS), .SHIFT_BITS(SHIFT_BITS), .Y_BITS(Y_BITS)) ends (acc, shift, y);

    task tick;
        begin
            #1 clk = 1;
            #1 clk = 0;
        end
    endtask

    initial begin
        if ($value$plusargs("x=%s", file)) $readmemh(file, x_mem);
        if ($value$plusargs("codes=%s", file)) $readmemh(file, code_mem);
        if ($value$plusargs("bias=%s", file)) $readmemh(file, bias_mem);
        if ($value$plusargs("shift=%s", file)) $readmemh(file, shift_mem);
        if ($value$plusargs("y=%s", file)) $readmemh(file, y_mem);
        wrong = 0;
        for (token = 0; token < TOKENS; token = token + 1)
            for (row = 0; row < OUT; row = row + 1) begin
                bias = bias_mem[row];
                shift = shift_mem[row];
                load = 1;
                tick;
                load = 0;
                for (column = 0; column < IN; column = column + 1) begin
                    x = x_mem[token*IN+column];
                    code = code_mem[row*IN+column];
                    tick;
                end
                if (y !== y_mem[token*OUT+row]) begin
                    wrong = wrong + 1;
                    if (wrong < 4) $display("token %0d, channel %0d: %0d, expected %0d", token, row, y, y_mem[token*OUT+row]);
                end
            end
        if (wrong == 0) $display("PASS: %0d outputs, every bit", TOKENS * OUT);
        else $display("FAIL: %0d of %0d outputs differ", wrong, TOKENS * OUT);
        $finish;
    end
endmodule
